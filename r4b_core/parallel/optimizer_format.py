"""A checkpoint's optimizer read by the other kind: the distributed one and the whole one keep the same numbers, under
other names.

================  ==============================  ==================================================
what              distributed                     whole on every rank
================  ==============================  ==================================================
moments           ``optimizer.state.exp_avg...``  the same
float32 weights   ``optimizer.state.param``       ``optimizer.state.fp32_param``; of float32 models the model's own
parameter groups  ``optimizer.param_groups``      the same; of float32 models ``param_groups``
================  ==============================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from r4b_core.parallel.learner import Learner

# Of the distributed optimizer's formats the one that any layout reads.
SHARDING_TYPE = "fully_reshardable"
_SHARDED, _WHOLE = "optimizer.state.param.", "optimizer.state.fp32_param."


def rename(template: dict[str, Any], learner: Learner) -> None:
    """Let a template of ``learner``'s optimizer, in place, ask for the names of the other kind's checkpoint."""
    if learner.runtime.distributed_optimizer and _is_float32(learner):
        for state in template["optimizer"].get("param_state", {}).values():
            del state["param"]
        return
    ours, theirs = (_SHARDED, _WHOLE) if learner.runtime.distributed_optimizer else (_WHOLE, _SHARDED)
    for part in _parts(template["optimizer"]):
        if part.key.startswith(ours):
            part.key = theirs + part.key.removeprefix(ours)


def is_left_out(name: str, learner: Learner) -> bool:
    """Whether a tensor of the other kind's checkpoint has no place in ``learner``'s optimizer."""
    return _is_float32(learner) and not learner.runtime.distributed_optimizer and name.startswith(_SHARDED)


def convert(loaded: dict[str, Any], learner: Learner) -> dict[str, Any]:
    """What was loaded by such a template, as ``learner``'s optimizer takes it; the model must be loaded before."""
    if learner.runtime.distributed_optimizer:
        kind = {"param_state_sharding_type": SHARDING_TYPE}
        if not _is_float32(learner):
            return {**loaded, **kind}
        (optimizer,) = learner.optimizer.chained_optimizers
        weights = (weight for buffer in optimizer.buffers for weight in buffer.param_index_map)
        for state, weight in zip(loaded["param_state"].values(), weights, strict=True):
            state["param"] = weight.detach().clone()
        return {"optimizer": {"param_groups": loaded["param_groups"]}, "param_state": loaded["param_state"], **kind}
    if not _is_float32(learner):
        return loaded
    saved, mine = loaded["optimizer"]["param_groups"], loaded["param_groups"]
    groups = [{**group, "params": own["params"]} for group, own in zip(saved, mine, strict=True)]
    return {"state": loaded["state"], "param_groups": groups}


def _is_float32(learner: Learner) -> bool:
    return learner.config.params_dtype == torch.float32


def _parts(value: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item)
