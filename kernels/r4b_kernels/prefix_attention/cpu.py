"""prefix_attention on the CPU: own segments and shared prefixes as two flash passes merged by log-sum-exp.

A prefix meets ALL its children's queries, laid end to end, in one dense rectangle: its keys and values are never
copied per child, and their gradient is summed inside one product, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from r4b_kernels import _varlen_cpu as varlen


@dataclass(frozen=True)
class Rectangle:
    """The tokens of one parent, and those of all its children: a range where they lie together, else an index."""

    parent: slice
    children: slice | Tensor


@dataclass(frozen=True)
class Plan:
    own: varlen.Plan
    rectangles: tuple[Rectangle, ...]


class Backend:
    """Forward and backward as the custom op wants them."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        plan = _plan_for(offsets, parent, q.shape[0])
        dtype = q.dtype
        q, k, v = varlen.operands(q, k, v)
        out, lse = varlen.forward(q, k, v, plan.own, True, scale)
        for rectangle in plan.rectangles:
            part, part_lse = varlen.attend(
                q[rectangle.children], k[rectangle.parent], v[rectangle.parent], False, scale
            )
            own, own_lse = out[rectangle.children], lse[rectangle.children]
            merged = torch.logaddexp(own_lse, part_lse)
            own.mul_((own_lse - merged).exp_()[..., None])
            own.addcmul_(part, (part_lse - merged).exp_()[..., None])
            lse[rectangle.children] = merged
            if isinstance(rectangle.children, Tensor):
                out[rectangle.children] = own
        return out.to(dtype), lse

    @staticmethod
    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Tensor,
        parent: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = _plan_for(offsets, parent, q.shape[0])
        dtype = q.dtype
        grad_out, q, k, v, out = varlen.operands(grad_out, q, k, v, out)
        grad_q, grad_k, grad_v = varlen.backward(grad_out, q, k, v, out, lse, plan.own, True, scale)
        for rectangle in plan.rectangles:
            rows, keys = rectangle.children, rectangle.parent
            part_q, part_k, part_v = varlen.attend_backward(
                grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], False, scale
            )
            # Every child, and every parent, is in one rectangle: no two parts meet, so the order of the sums is fixed.
            grad_q[rows] += part_q
            grad_k[keys] += part_k
            grad_v[keys] += part_v
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _plan_for(offsets: Tensor, parent: Tensor, num_tokens: int) -> Plan:
    plan = _make_plan(offsets.numpy().tobytes(), parent.numpy().tobytes())
    if plan.own.total > num_tokens:
        raise ValueError(f"layout covers {plan.own.total} tokens but q has {num_tokens}: cut it to the stream's length")
    return plan


# Keyed by content: whoever holds the layout, and however often it is rebuilt, all layers find the same plan.
@lru_cache(maxsize=32)
def _make_plan(offsets_bytes: bytes, parent_bytes: bytes) -> Plan:
    bounds, parents = (np.frombuffer(x, dtype=np.int32).tolist() for x in (offsets_bytes, parent_bytes))
    if bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError("layout.offsets must start at 0 and never decrease")
    children: dict[int, list[tuple[int, int]]] = {}
    for segment, owner in enumerate(parents):
        if owner != -1 and not (0 <= owner < segment and parents[owner] == -1):
            raise ValueError(
                f"layout.parent[{segment}] = {owner}: a parent must be an earlier segment that has no parent itself"
            )
        if owner >= 0 and bounds[owner] < bounds[owner + 1] and bounds[segment] < bounds[segment + 1]:
            children.setdefault(owner, []).append((bounds[segment], bounds[segment + 1]))
    rectangles = tuple(
        Rectangle(slice(bounds[owner], bounds[owner + 1]), _tokens(spans)) for owner, spans in children.items()
    )
    return Plan(varlen.make_plan(bounds, causal=True), rectangles)


def _tokens(spans: list[tuple[int, int]]) -> slice | Tensor:
    if all(stop == start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop in spans])
