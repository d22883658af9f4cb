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
    """A parent ``[start, stop)`` and its children's tokens: rows ``[row, row + count)`` of ``Plan.children``."""

    start: int
    stop: int
    row: int
    count: int


@dataclass(frozen=True)
class Plan:
    total: int
    own: varlen.Plan
    rectangles: tuple[Rectangle, ...]
    children: Tensor  # int64 [C], tokens that have a non-empty parent, grouped by parent


class Backend:
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, parent: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        plan = _plan_for(offsets, parent, q.shape[0])
        dtype, dtype_out = varlen.working_dtype(q.dtype), q.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=dtype)
        lse = torch.empty(q.shape[:2], dtype=dtype)
        out[plan.total :] = 0
        lse[plan.total :] = float("-inf")
        varlen.forward(q, k, v, plan.own, True, scale, out, lse)
        if plan.rectangles:
            _merge_prefixes(q, k, v, plan, scale, out, lse)
        return out.to(dtype_out), lse

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
        dtype, dtype_out = varlen.working_dtype(q.dtype), q.dtype
        grad_out, q, k, v, out = (x.to(dtype) for x in (grad_out, q, k, v, out))
        grads = tuple(torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
        for grad in grads:
            grad[plan.total :] = 0
        varlen.backward(grad_out, q, k, v, out, lse, plan.own, True, scale, grads)
        if plan.rectangles:
            _add_prefix_gradients(grad_out, q, k, v, out, lse, plan, scale, grads)
        return tuple(grad.to(dtype_out) for grad in grads)


def _merge_prefixes(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor, lse: Tensor) -> None:
    queries = q.index_select(0, plan.children)
    parts = [
        varlen.attend(queries[r.row : r.row + r.count], k[r.start : r.stop], v[r.start : r.stop], False, scale)
        for r in plan.rectangles
    ]
    shared, shared_lse = torch.cat([part for part, _ in parts]), torch.cat([part_lse for _, part_lse in parts])
    own, own_lse = out.index_select(0, plan.children), lse.index_select(0, plan.children)
    merged = torch.logaddexp(own_lse, shared_lse)
    own.mul_((own_lse - merged).exp_()[..., None])
    own.addcmul_(shared, (shared_lse - merged).exp_()[..., None])
    out.index_copy_(0, plan.children, own)
    lse.index_copy_(0, plan.children, merged)


def _add_prefix_gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    grad_q, grad_k, grad_v = grads
    grad_rows, q_rows, out_rows, lse_rows = (x.index_select(0, plan.children) for x in (grad_out, q, out, lse))
    parts = []
    for r in plan.rectangles:
        rows, keys = slice(r.row, r.row + r.count), slice(r.start, r.stop)
        part_q, part_k, part_v = varlen.attend_backward(
            grad_rows[rows], q_rows[rows], k[keys], v[keys], out_rows[rows], lse_rows[rows], False, scale
        )
        parts.append(part_q)
        grad_k[keys] += part_k
        grad_v[keys] += part_v
    # Every child token is in one rectangle, so no two rows meet and the order of the sum is fixed.
    grad_q.index_add_(0, plan.children, torch.cat(parts))


def _plan_for(offsets: Tensor, parent: Tensor, num_tokens: int) -> Plan:
    plan = _make_plan(offsets.numpy().tobytes(), parent.numpy().tobytes())
    if plan.total > num_tokens:
        raise ValueError(f"layout covers {plan.total} tokens but q has {num_tokens}: the layout is longer than the stream")
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
            raise ValueError(f"layout.parent[{segment}] = {owner}: a parent must be an earlier segment without a parent")
        if owner >= 0 and bounds[owner] < bounds[owner + 1] and bounds[segment] < bounds[segment + 1]:
            children.setdefault(owner, []).append((bounds[segment], bounds[segment + 1]))

    rectangles, tokens, row = [], [], 0
    for owner, spans in children.items():
        count = sum(stop - start for start, stop in spans)
        rectangles.append(Rectangle(bounds[owner], bounds[owner + 1], row, count))
        tokens.extend(torch.arange(start, stop) for start, stop in spans)
        row += count
    own = varlen.make_plan(list(zip(bounds, bounds[1:], strict=False)), causal=True)
    index = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
    return Plan(bounds[-1], own, tuple(rectangles), index)
