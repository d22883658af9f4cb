"""The definition of linear_logprob: dense logits, in float32, or float64 when given float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import check_target_range, group_of, shard_start, sum_over


def logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[T, V] in the accumulation dtype."""
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.to(dtype) @ weight.to(dtype).T / temperature


def logprob_and_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What the op returns, from dense logits of the whole vocabulary; differentiable by autograd."""
    masked = target < 0
    logits = logits.masked_fill(masked[:, None], 0.0)
    log_p = torch.log_softmax(logits, dim=-1)
    logprob = log_p.gather(1, target.clamp_min(0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logprob.masked_fill(masked, 0.0), entropy.masked_fill(masked, 0.0)


def gathered_logits(hidden: Tensor, weight: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """Dense logits of the whole vocabulary, gathered from all shards (not differentiable through the gather)."""
    local = logits(hidden, weight, temperature).contiguous()
    if group is None:
        return local
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local, group=group)
    return torch.cat(shards, dim=1)


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp), each [T]."""
    check_target_range(target, weight.shape[0], group_of(group))
    z = gathered_logits(hidden, weight, temperature, group_of(group))
    return *logprob_and_entropy(z, target), torch.logsumexp(z, dim=-1)


def backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    temperature: float,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d logprob / dz = onehot - p and d entropy / dz = -p (log p + entropy), written out densely."""
    ranks = group_of(group)
    log_p = torch.log_softmax(gathered_logits(hidden, weight, temperature, ranks), dim=-1)
    zeros = torch.zeros_like(logsumexp)
    grad_logprob = (zeros if grad_logprob is None else grad_logprob)[:, None]
    grad_entropy = (zeros if grad_entropy is None else grad_entropy)[:, None]
    one_hot = torch.zeros_like(log_p).scatter_(1, target.clamp_min(0)[:, None], 1.0)
    grad_z = grad_logprob * (one_hot - log_p.exp()) - grad_entropy * log_p.exp() * (log_p + entropy[:, None])
    return gradients_of_logits(grad_z, hidden, weight, target, temperature, group, need_hidden, need_weight)


def gradients_of_logits(
    grad_z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad hidden, grad weight shard) from the gradient of the whole vocabulary's logits; masked rows give none."""
    ranks = group_of(group)
    masked = (target < 0)[:, None]
    start = shard_start(weight.shape[0], ranks)
    grad_z = grad_z[:, start : start + weight.shape[0]].masked_fill(masked, 0.0) / temperature
    clean_hidden = hidden.to(grad_z.dtype).masked_fill(masked, 0.0)
    grad_hidden = sum_over(grad_z @ weight.to(grad_z.dtype), ranks) if need_hidden else grad_z.new_empty(0)
    grad_weight = grad_z.T @ clean_hidden if need_weight else grad_z.new_empty(0)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


class Backend:
    """The reference backend."""

    forward = staticmethod(forward)
    backward = staticmethod(backward)
