"""Inputs of decode_attention, shared by its tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r4b_kernels import decode_attention

CACHES = ("own_keys", "own_values")

# Rows per prompt, s, D, P, M. Of every size some that leave a rest.
CASES = [
    ((1,), 1, 8, 8, 8),
    ((8,), 2, 32, 32, 40),
    ((3, 3), 2, 16, 24, 16),
    ((5, 0, 1, 19), 2, 16, 24, 24),
    ((2, 7), 4, 72, 40, 8),
    ((1, 4), 7, 24, 16, 32),
    ((3,), 33, 8, 64, 8),
]


def rope_table(position: Tensor, dim: int, theta: float = 1e4) -> Tensor:
    angle = position[:, None].double() * theta ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])


def make_case(counts: tuple[int, ...], share: int, dim: int, longest: int, own: int, heads: int = 2) -> dict[str, Any]:
    """float64 inputs; rows idle, begin, go on, are full and past it; unused columns hold large values."""
    torch.manual_seed(sum(counts) + dim)
    rows, prompts = sum(counts), len(counts)
    lengths = torch.randint(1, longest + 1, (prompts,))
    lengths[0] = longest
    column = torch.randint(-1, own + 2, (rows,))
    column[: min(rows, 4)] = torch.tensor([own // 2, -1, own - 1, own + 1])[:rows]
    normal: Callable[..., Tensor] = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    inputs = dict(
        mixed=normal(rows, heads, share + 2, dim),
        q_weight=1 + 0.3 * normal(dim),
        k_weight=1 + 0.3 * normal(dim),
        rope=rope_table(torch.randint(0, 500, (rows,)), dim),
        column=column,
        prompt_keys=normal(heads, prompts, dim, longest),
        prompt_values=normal(heads, prompts, longest, dim),
        prompt_lengths=lengths,
        offsets=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        own_keys=normal(heads, rows, dim, own),
        own_values=normal(heads, rows, own, dim),
    )
    unused = torch.arange(longest) >= lengths[:, None]
    inputs["prompt_keys"].masked_fill_(unused[:, None], 1e3)
    inputs["prompt_values"].masked_fill_(unused[..., None], 1e3)
    unwritten = torch.arange(own) > column[:, None]
    inputs["own_keys"].masked_fill_(unwritten[:, None], 1e3)
    inputs["own_values"].masked_fill_(unwritten[..., None], 1e3)
    return inputs


def without_rows() -> dict[str, Any]:
    inputs = make_case((1,), 2, 16, 8, 8)
    inputs = {
        name: x[:, :0] if name in (*CACHES, "rope") else x[:0] if name in ("mixed", "column") else x
        for name, x in inputs.items()
    }
    return {name: x.contiguous() for name, x in inputs.items()} | {"offsets": torch.tensor([0, 0])}


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def run(inputs: dict[str, Any], backend: str | None, **options: Any) -> dict[str, Tensor]:
    """The result and the caches afterwards; the inputs stay as they are."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    out = decode_attention(**inputs, backend=backend, **options)
    return {"out": out, **{name: inputs[name] for name in CACHES}}


def error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name].double() - x).norm() / x.norm()) for name, x in exact.items()}
