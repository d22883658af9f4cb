"""Triton backend of qk_norm_mrope: q and k in one launch, one pass over memory forward and one backward.

A program owns a few tokens and walks over their heads. A token's cosines and sines are made once, in registers, and
serve all of its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.qk_norm_mrope.reference import frequencies
from r4b_kernels.triton_support import accumulator, sum_partials

WARPS = 4
LARGEST_HEAD = 1024
# Pairs of a tile that one head of all its tokens fills: with 4 warps, 8 neighbouring pairs per thread, so that a thread
# reads 16 bytes of bfloat16 from either half of a head.
PAIRS = 1024
FORWARD_HEADS = 4
BACKWARD_HEADS = 2
# Programs that fill a large GPU several times over: with fewer blocks of tokens, the heads are shared out as well.
ENOUGH_PROGRAMS = 1024


class Backend:
    """The triton backend."""

    @staticmethod
    def refuses(q: Tensor, *_: Tensor) -> str | None:
        return f"head_dim {q.shape[-1]} is over {LARGEST_HEAD}" if q.shape[-1] > LARGEST_HEAD else None

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        position_ids: Tensor,
        theta: float,
        axes: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
        grid, tile = _launch(q, k, FORWARD_HEADS)
        if grid[0]:
            q, k = _rows(q), _rows(k)
            _forward[grid](
                *(q, q_weight.contiguous(), out_q, q.stride(0), q.shape[1]),
                *(k, k_weight.contiguous(), out_k, k.stride(0), k.shape[1]),
                *(position_ids, *position_ids.stride(), _frequencies(q, theta, axes), q.shape[0], eps),
                **(tile | {"Q_HEAD": q.stride(1), "K_HEAD": k.stride(1), "AXES": 3 if len(axes) else 1}),
            )
        return out_q, out_k

    @staticmethod
    def backward(
        grad_q: Tensor,
        grad_k: Tensor,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        position_ids: Tensor,
        theta: float,
        axes: Sequence[int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
        grid, tile = _launch(q, k, BACKWARD_HEADS)
        shares = q.new_empty((2, grid[0] * grid[1], q.shape[-1]), dtype=accumulation_dtype(q.dtype))
        if grid[0]:
            grad_q, grad_k, q, k = (_rows(x) for x in (grad_q, grad_k, q, k))
            strides = {"Q_HEAD": q.stride(1), "K_HEAD": k.stride(1)}
            strides |= {"GRAD_Q_HEAD": grad_q.stride(1), "GRAD_K_HEAD": grad_k.stride(1)}
            _backward[grid](
                *(grad_q, q, q_weight.contiguous(), dq, grad_q.stride(0), q.stride(0), q.shape[1]),
                *(grad_k, k, k_weight.contiguous(), dk, grad_k.stride(0), k.stride(0), k.shape[1]),
                *(position_ids, *position_ids.stride(), _frequencies(q, theta, axes), shares, q.shape[0], eps),
                **(tile | strides | {"AXES": 3 if len(axes) else 1}),
            )
        return dq, dk, sum_partials(shares[0], q_weight.dtype), sum_partials(shares[1], k_weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """Heads may lie anywhere (slices of one projection are read in place), the entries of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, heads: int) -> tuple[tuple[int, int], dict]:
    """The grid (blocks of tokens, shares of the heads) and the constants of a tile."""
    half = triton.next_power_of_2(q.shape[-1] // 2)
    tokens = max(1, PAIRS // half)
    heads = min(heads, triton.next_power_of_2(max(q.shape[1], k.shape[1], 1)))
    blocks = triton.cdiv(q.shape[0], tokens)
    shares = max(1, min(ENOUGH_PROGRAMS // max(blocks, 1), triton.cdiv(max(q.shape[1], k.shape[1]), heads)))
    tile = {"D": q.shape[-1], "HALF": half, "TOKENS": tokens, "HEADS": heads}
    return (blocks, shares), tile | {"ACC": accumulator(q.dtype), "num_warps": WARPS}


def _frequencies(q: Tensor, theta: float, axes: Sequence[int]) -> Tensor:
    # What a capture makes is the graph's own memory: nobody else may keep it.
    capturing = q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    make = _frequencies_of.__wrapped__ if capturing else _frequencies_of
    return make(q.shape[-1], theta, tuple(axes), accumulation_dtype(q.dtype), q.device)


@lru_cache(maxsize=64)
def _frequencies_of(
    head_dim: int, theta: float, axes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[axes, D/2] radians per position: 0 where a pair does not turn with the axis. The reference's, bit for bit."""
    frequency = frequencies(head_dim, theta, dtype, device)
    if not axes:
        return frequency[None]
    chosen = torch.tensor(axes)[None] == torch.arange(3)[:, None]
    return torch.where(chosen.to(device), frequency, torch.zeros_like(frequency))


@triton.jit(do_not_specialize=["axis_stride", "tokens"])
def _forward(
    q, q_weight, out_q, q_token, q_heads,
    k, k_weight, out_k, k_token, k_heads,
    position, axis_stride, position_stride, frequency, tokens, eps,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, AXES: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cos, sin = _cos_sin(
        _angles(position, axis_stride, position_stride, frequency, token, tokens, D, HALF, TOKENS, AXES, ACC), ACC
    )
    _forward_heads(q, q_weight, out_q, q_token, q_heads, token, tokens, cos, sin, eps, D, HALF, HEADS, Q_HEAD, ACC)
    _forward_heads(k, k_weight, out_k, k_token, k_heads, token, tokens, cos, sin, eps, D, HALF, HEADS, K_HEAD, ACC)


@triton.jit
def _forward_heads(
    x, weight, out, x_token, heads, token, tokens, cos, sin, eps,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, X_HEAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of this program's share of the heads; tiles are [TOKENS, HEADS, HALF], one per half of D."""
    w1, w2 = _load_halves(weight, tl.arange(0, HALF), tl.arange(0, HALF) < D // 2, D, ACC)
    row = token[:, None, None].to(tl.int64)
    pair = tl.arange(0, HALF)[None, None, :]
    for first in range(tl.program_id(1) * HEADS, heads, tl.num_programs(1) * HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]
        mask = (row < tokens) & (head < heads) & (pair < D // 2)
        x1, x2 = _load_halves(x, row * x_token + head * X_HEAD + pair, mask, D, ACC)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / D + eps)[:, :, None]
        # Two roundings, as transformers' Qwen3 makes them: of the normalised x, and of its product with the weight.
        y1 = _rounded(_rounded(x1 * rstd, out, ACC) * w1[None, None, :], out, ACC)
        y2 = _rounded(_rounded(x2 * rstd, out, ACC) * w2[None, None, :], out, ACC)
        z1 = y1 * cos[:, None, :] - y2 * sin[:, None, :]
        z2 = y2 * cos[:, None, :] + y1 * sin[:, None, :]
        _store_halves(out, (row * heads + head) * D + pair, z1, z2, mask, D)


@triton.jit(do_not_specialize=["axis_stride", "tokens"])
def _backward(
    grad_q, q, q_weight, dq, grad_q_token, q_token, q_heads,
    grad_k, k, k_weight, dk, grad_k_token, k_token, k_heads,
    position, axis_stride, position_stride, frequency, shares, tokens, eps,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, AXES: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, GRAD_Q_HEAD: tl.constexpr, GRAD_K_HEAD: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cos, sin = _cos_sin(
        _angles(position, axis_stride, position_stride, frequency, token, tokens, D, HALF, TOKENS, AXES, ACC), ACC
    )
    programs = tl.num_programs(0) * tl.num_programs(1)
    share = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    _backward_heads(
        grad_q, q, q_weight, dq, shares + share * D, grad_q_token, q_token, q_heads, token, tokens, cos, sin, eps,
        D, HALF, TOKENS, HEADS, GRAD_Q_HEAD, Q_HEAD, ACC,
    )  # fmt: skip
    _backward_heads(
        grad_k, k, k_weight, dk, shares + (programs + share) * D, grad_k_token, k_token, k_heads,
        token, tokens, cos, sin, eps, D, HALF, TOKENS, HEADS, GRAD_K_HEAD, K_HEAD, ACC,
    )  # fmt: skip


@triton.jit
def _backward_heads(
    grad, x, weight, dx, share, grad_token, x_token, heads, token, tokens, cos, sin, eps,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    GRAD_HEAD: tl.constexpr, X_HEAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of this program's heads, and their share of the weight's gradient [D]."""
    column = tl.arange(0, HALF)
    w1, w2 = _load_halves(weight, column, column < D // 2, D, ACC)
    dw1 = tl.zeros([TOKENS, HALF], dtype=ACC)
    dw2 = tl.zeros([TOKENS, HALF], dtype=ACC)
    row = token[:, None, None].to(tl.int64)
    pair = column[None, None, :]
    for first in range(tl.program_id(1) * HEADS, heads, tl.num_programs(1) * HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]
        mask = (row < tokens) & (head < heads) & (pair < D // 2)
        x1, x2 = _load_halves(x, row * x_token + head * X_HEAD + pair, mask, D, ACC)
        g1, g2 = _load_halves(grad, row * grad_token + head * GRAD_HEAD + pair, mask, D, ACC)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / D + eps)[:, :, None]
        n1 = x1 * rstd
        n2 = x2 * rstd
        # A rotation's transpose is the rotation by the negative angle.
        h1 = g1 * cos[:, None, :] + g2 * sin[:, None, :]
        h2 = g2 * cos[:, None, :] - g1 * sin[:, None, :]
        dw1 += tl.sum(h1 * n1, axis=1)
        dw2 += tl.sum(h2 * n2, axis=1)
        h1 *= w1[None, None, :]
        h2 *= w2[None, None, :]
        along = (tl.sum(h1 * n1 + h2 * n2, axis=2) / D)[:, :, None]
        _store_halves(dx, (row * heads + head) * D + pair, (h1 - n1 * along) * rstd, (h2 - n2 * along) * rstd, mask, D)
    _store_halves(share, column, tl.sum(dw1, axis=0), tl.sum(dw2, axis=0), column < D // 2, D)


@triton.jit
def _angles(
    position, axis_stride, position_stride, frequency, token, tokens,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, AXES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[TOKENS, HALF] radians. Every pair has one frequency that is not 0: the sum over the axes does not round."""
    pair = tl.arange(0, HALF)
    angle = tl.zeros([TOKENS, HALF], dtype=ACC)
    for axis in tl.static_range(AXES):
        here = position + axis * axis_stride.to(tl.int64) + token.to(tl.int64) * position_stride
        place = tl.load(here, mask=token < tokens, other=0).to(ACC)
        rate = tl.load(frequency + axis * (D // 2) + pair, mask=pair < D // 2, other=0.0)
        angle += place[:, None] * rate[None, :]
    return angle


@triton.jit
def _cos_sin(angle, ACC: tl.constexpr):
    """cos and sin to 1e-7 at any angle of a position below 2^24.

    The library's float32 functions keep a table in local memory for large angles. Here the quarter turns are taken off
    in float64, once per token and pair; what is left, at most pi/4, is a Taylor series (truncated below 2e-9).
    """
    if ACC == tl.float64:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    else:
        turns = angle.to(tl.float64) * 0.6366197723675814
        nearest = tl.floor(turns + 0.5)
        quarter = nearest.to(tl.int32)
        r = ((turns - nearest) * 1.5707963267948966).to(tl.float32)
        s = r * r
        sine = r + r * s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s / 362880)))
        cosine = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s / 3628800))))
        odd = (quarter & 1) == 1
        cos = tl.where(odd, sine, cosine)
        sin = tl.where(odd, cosine, sine)
        cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
        sin = tl.where((quarter & 2) == 2, -sin, sin)
    return cos, sin


@triton.jit
def _load_halves(x, here, mask, D: tl.constexpr, ACC: tl.constexpr):
    first = tl.load(x + here, mask=mask, other=0.0).to(ACC)
    return first, tl.load(x + here + D // 2, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_halves(out, here, first, second, mask, D: tl.constexpr):
    tl.store(out + here, first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + here + D // 2, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x, like, ACC: tl.constexpr):
    return x.to(like.dtype.element_ty).to(ACC)
