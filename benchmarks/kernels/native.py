"""The C++ CPU backends against the composed torch that serves without them, op by op at the public function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import ON_GPU
from benchmarks.kernels._step import STEPS, timed
from r4b_kernels import native, qk_norm_mrope, rms_norm, scatter_vision

_REASON = "a GPU takes other backends" if ON_GPU else native.cpu_available(torch.device("cpu"))
pytestmark = [pytest.mark.skipif(_REASON is not None, reason=str(_REASON)), pytest.mark.parametrize("step", STEPS)]

Shape = tuple[int, ...]


def shapes(*sizes: Shape) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", sizes, ids=lambda shape: "x".join(map(str, shape)))


def compare(
    op: Callable, inputs: tuple[Tensor, ...], step: str, contest: Callable[..., None], moved: tuple[float, float]
) -> None:
    """``op(*inputs, backend=)``, a tuple, in C++ and composed. ``moved`` are the floats that must move, each way."""
    ours, composed = (lambda *x, name=name: op(*x, backend=name) for name in ("native", "cpu"))
    grads = tuple(torch.randn_like(out) for out in composed(*inputs))
    contest(
        timed(ours, inputs, grads, step),
        {"composed torch": timed(composed, inputs, grads, step)},
        bytes_moved=int(4 * moved[STEPS.index(step)]),
        flops=0,
    )


@shapes((16, 128), (1500, 128), (6000, 32), (512, 2560))
def test_rms_norm(shape: Shape, step: str, contest: Callable[..., None]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[1:], requires_grad=True)

    def op(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor]:
        return (rms_norm(x, weight, backend=backend),)

    compare(op, (x, weight), step, contest, (2 * x.numel(), 3 * x.numel()))


@shapes((16, 4, 2, 32), (2048, 4, 2, 32), (512, 32, 8, 128))
def test_qk_norm_mrope(shape: Shape, step: str, contest: Callable[..., None]) -> None:
    """Tokens, query heads, key heads, head dim."""
    tokens, q_heads, k_heads, dim = shape
    heads = [torch.randn(tokens, count, dim, requires_grad=True) for count in (q_heads, k_heads)]
    weights = [torch.randn(dim, requires_grad=True) for _ in range(2)]
    positions = torch.arange(tokens).expand(3, -1)

    def op(*x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return qk_norm_mrope(*x, positions, theta=1e6, backend=backend)

    rows, tables = tokens * (q_heads + k_heads) * dim, tokens * dim
    compare(op, (*heads, *weights), step, contest, (2 * rows + tables, 3 * rows + tables))


@pytest.mark.parametrize("accumulate", [False, True], ids=["replace", "add"])
@shapes((64, 128), (2048, 128), (2048, 2560))
def test_scatter_vision(shape: Shape, accumulate: bool, step: str, contest: Callable[..., None]) -> None:
    """Every other token is a vision token."""
    embeddings, features = torch.randn(shape, requires_grad=True), torch.randn(shape[0] // 2, shape[1])
    index = torch.full((shape[0],), -1)
    index[::2] = torch.arange(shape[0] // 2)

    def op(embeddings: Tensor, features: Tensor, backend: str) -> tuple[Tensor]:
        return (scatter_vision(embeddings, features, index, accumulate=accumulate, backend=backend),)

    rows = embeddings.numel()
    moved = (2.5 * rows, rows) if accumulate else (2 * rows, 2.5 * rows)
    compare(op, (embeddings, features.requires_grad_()), step, contest, moved)
