"""verl's own modules, imported without ray.

verl imports ray for the processes that it starts, of which the functions compared here know nothing; ray is 80 MB.
Where it is missing, an empty module with the one name that annotations mention stands in for it during the import.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    if importlib.util.find_spec("ray") is not None:
        yield
        return
    stand_in = types.ModuleType("ray")
    stand_in.ObjectRef = object  # type: ignore[attr-defined]
    sys.modules["ray"] = stand_in
    try:
        yield
    finally:
        del sys.modules["ray"]  # others ask whether ray is there


with _without_ray():
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    AlgoConfig = importlib.import_module("verl.trainer.config").AlgoConfig
    ActorConfig = importlib.import_module("verl.workers.config").ActorConfig
    fused_linear = importlib.import_module("verl.utils.experimental.torch_functional")
    dense_common = importlib.import_module("verl.models.transformers.dense_common")
    seqlen_balancing = importlib.import_module("verl.utils.seqlen_balancing")
