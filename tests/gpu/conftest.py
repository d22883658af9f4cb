"""On a GPU: uninitialised memory is NaN. In the rehearsal (TRITON_INTERPRET=1): the interpreter made honest, too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreter import shim

    shim.install()


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
