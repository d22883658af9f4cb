"""Log-softmax over a vocabulary that may be cut into equal shards, one per rank of a process group.

A shard reduces its logits to four numbers per row; two small collectives make them those of the whole vocabulary.
Process groups cannot pass through an operator's schema, so operators carry the group's name.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from r4b_kernels import dispatch
from r4b_kernels.precision import accumulation_dtype


class RowStatistics(NamedTuple):
    """What a row's logits z reduce to, all [T] in the accumulation dtype, m being ``maximum``.

    ``total`` is sum exp(z - m), ``weighted`` is sum exp(z - m) * (z - m), ``target`` is the logit of the target, or 0
    where the target lies in another shard.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    target: Tensor

    @property
    def logsumexp(self) -> Tensor:
        return self.maximum + self.total.log()

    @property
    def logprob(self) -> Tensor:
        return (self.target - self.maximum) - self.total.log()

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.weighted / self.total


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """The name that carries a group through an operator's schema; None for no group or a group of one rank."""
    return None if group is None or group.size() == 1 else group.group_name


def group_of(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else _resolve_process_group(cast(Any, name))


def shard_start(shard_size: int, group: dist.ProcessGroup | None) -> int:
    """The global id of this rank's first vocabulary row."""
    return 0 if group is None else group.rank() * shard_size


def vocabulary_size(shard_size: int, group: dist.ProcessGroup | None) -> int:
    """The number of ids in the whole vocabulary."""
    return shard_size * (1 if group is None else group.size())


def merge_shards(local: RowStatistics, group: dist.ProcessGroup | None) -> RowStatistics:
    """The statistics of the whole vocabulary from every rank's own: one max and one sum over [T] and [3, T]."""
    if group is None:
        return local
    maximum = local.maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    shift = local.maximum - maximum
    scale = shift.exp()
    sums = torch.stack([local.total * scale, (local.weighted + local.total * shift) * scale, local.target])
    dist.all_reduce(sums, group=group)
    return RowStatistics(maximum, *sums.unbind())


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group, reduced in the accumulation dtype and given back in the tensor's own."""
    if group is None:
        return tensor
    reduced = tensor.to(accumulation_dtype(tensor.dtype), copy=True)
    dist.all_reduce(reduced, group=group)
    return reduced.to(tensor.dtype)


def check_head(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    """Raise a ValueError that names the argument unless shapes, dtypes and devices are those of an LM head."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point [T, H], it is {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, H] with H={hidden.shape[1]} and V >= 1, it is {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype} and hidden {hidden.dtype}: cast one, they must be of one dtype")
    if target.dtype != torch.int64 or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"target must be int64 [T] with T={hidden.shape[0]}, it is {target.dtype} {tuple(target.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive (greedy decoding has no log-probability)")
    dispatch.check_devices("hidden", hidden.device, weight=weight, target=target)


def check_first_derivative(op: str) -> None:
    """Raise where autograd records the backward of an op whose gradient is a constant made in its forward pass."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op} has no second derivative: its gradient is computed in the forward pass. "
            "Leave out create_graph=True, or compute this loss from logits"
        )


def check_target_range(target: Tensor, shard_size: int, group: dist.ProcessGroup | None) -> None:
    """Raise a ValueError for a target beyond the vocabulary. Reads the values: for backends that run on the host."""
    vocabulary = vocabulary_size(shard_size, group)
    if target.numel() and int(target.max()) >= vocabulary:
        raise ValueError(
            f"target has the id {int(target.max())}, the vocabulary has {vocabulary} rows: "
            "mask a row with a negative id"
        )
