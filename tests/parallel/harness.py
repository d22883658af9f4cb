"""Compare layouts of one model: the same weights by global name, then the loss and every gradient by global name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import Tensor

from r4b_core.parallel.learner import Learner, LossFn
from r4b_core.parallel.runtime import Runtime, start


@dataclass
class Layout:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    virtual_stages: int = 1
    recompute: str = "none"
    timeout_s: int = 60


@dataclass
class Optim:
    lr: float = 1e-2
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    warmup_steps: int = 2
    schedule: str = "cosine"
    lr_scale: dict[str, float] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)


Model = torch.nn.Module | Sequence[torch.nn.Module]
"""A pipeline stage, or its chunks."""


def chunks_of(model: Model) -> list[torch.nn.Module]:
    return [model] if isinstance(model, torch.nn.Module) else list(model)


def build_chunks(build: Callable[..., torch.nn.Module], layout: Any) -> list[torch.nn.Module]:
    """This rank's chunks by ``build(layout)``, or ``build(layout, chunk)`` where there are several."""
    count = layout.virtual_stages
    return [build(layout)] if count == 1 else [build(layout, chunk) for chunk in range(count)]


def sharded_tensors(model: Model, pick: Callable[[Tensor], Tensor]) -> Iterator[ShardedTensor]:
    """Every part of a tensor that this rank holds, with ``pick(parameter)`` as its data."""

    def visit(value: Any) -> Iterator[ShardedTensor]:
        if isinstance(value, ShardedTensorFactory):
            yield from visit(replace(value, data=pick(value.data)).build())
        elif isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from visit(item)
        elif isinstance(value, list):
            for item in value:
                yield from visit(item)

    for value in (value for chunk in chunks_of(model) for value in chunk.sharded_state_dict().values()):
        if isinstance(value, ShardedTensor):
            yield replace(value, data=pick(value.data))
        else:
            yield from visit(value)


def _place(part: ShardedTensor) -> tuple[slice, ...]:
    sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return tuple(slice(start, start + size) for start, size in zip(part.global_offset, sizes, strict=True))


@torch.no_grad()
def fill_by_name(model: Model, scale: float = 0.05) -> None:
    """Values that depend on a tensor's global name and place only, whatever the layout; norms lie around one."""
    for part in sharded_tensors(model, lambda parameter: parameter):
        seed = int.from_bytes(hashlib.sha256(part.key.encode()).digest()[:4], "big")
        whole = torch.randn(part.global_shape, generator=torch.Generator().manual_seed(seed)) * scale
        base = 1.0 if "norm" in part.key and part.key.endswith("weight") else 0.0
        part.data.copy_(whole[_place(part)].reshape(part.data.shape) + base)


def gather_by_name(model: Model, pick: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Whole tensors by global name, assembled from all ranks. A collective of all ranks."""
    parts = []
    for part in sharded_tensors(model, lambda parameter: _or_zeros(pick(parameter), parameter)):
        if is_main_replica(part.replica_id):
            # A copy, since pickling a view pickles all that it is a view of: here every gradient, each time.
            parts.append((part.key, part.global_shape, _place(part), part.data.detach().float().cpu().clone()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, parts)
    whole: dict[str, Tensor] = {}
    for key, shape, place, data in (part for parts in everyone for part in parts):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[place] = data.reshape(target[place].shape)
    return whole


def _or_zeros(value: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32) if value is None else value


def parameters_by_name(model: Model) -> dict[str, Tensor]:
    return gather_by_name(model, lambda parameter: parameter)


def gradients_by_name(model: Model) -> dict[str, Tensor]:
    """The whole gradient after a step without clipping and without the distributed optimizer."""
    return gather_by_name(model, lambda parameter: getattr(parameter, "main_grad", None))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``truth`` (over one where that is 0)."""
    return float((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30)) if truth.numel() else 0.0


@dataclass
class Measured:
    loss: float
    grad_norm: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def measure(
    layout: Any,
    build_model: Callable[..., torch.nn.Module],
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    fill: Callable[[Model], None] = fill_by_name,
    share: bool = True,
    optim: Any = None,
) -> Measured:
    """Loss and gradients of one step in ``layout``. With ``share`` data-parallel ranks divide the batches."""
    runtime = start(replace(layout, distributed_optimizer=False), seed=1)
    try:
        chunks = build_chunks(build_model, layout)
        fill(chunks)
        learner = Learner(chunks, runtime, optim or Optim(clip_grad=0.0), total_steps=10)
        mine = list(batches)[runtime.dp_rank :: runtime.dp] if share else list(batches)
        result = learner.step(mine, loss_fn)
        return Measured(result.loss, result.grad_norm, result.metrics, gradients_by_name(learner.models))
    finally:
        runtime.stop()


def compare_layouts(
    build_model: Callable[..., torch.nn.Module],
    batches: Sequence[Any],
    loss_fn: LossFn,
    layouts: dict[str, Any],
    *,
    tolerance: float = 5e-6,
    fill: Callable[[Model], None] = fill_by_name,
) -> dict[str, float]:
    """Check each layout against TP = PP = CP = 1, where every rank computes all batches: one rank's result.

    Args:
        build_model: layout (and chunk) -> this rank's pipeline stage (or chunk); called after the groups exist.
        batches: as many as the largest data-parallel size, or more.

    Returns:
        The worst relative error of the loss, the gradient norm and any gradient, by layout.
    """
    truth = measure(Layout(), build_model, batches, loss_fn, fill=fill, share=False)
    worst = {}
    for name, layout in layouts.items():
        found = measure(layout, build_model, batches, loss_fn, fill=fill)
        strangers = found.gradients.keys() ^ truth.gradients.keys()
        assert not strangers, f"{name} has other parameters: {strangers}"
        errors = {key: relative_error(found.gradients[key], value) for key, value in truth.gradients.items()}
        errors["loss"] = abs(found.loss - truth.loss) / abs(truth.loss)
        errors["grad_norm"] = abs(found.grad_norm - truth.grad_norm) / truth.grad_norm
        worst[name] = max(errors.values())
        bad = {key: error for key, error in errors.items() if not error <= tolerance}
        assert not bad, f"{name} differs from one rank: {bad}"
    return worst


def train(learner: Learner, runtime: Runtime, batches: Sequence[Any], loss_fn: LossFn, steps: int) -> list[Any]:
    mine = list(batches)[runtime.dp_rank :: runtime.dp]
    return [learner.step(mine, loss_fn) for _ in range(steps)]
