"""Triton backend of merge_norm: patches are fetched from where they lie and written where they go, in one pass.

A tile is [places, C] and is held in registers: several patches with a row of statistics each, or (JOINT) the patches of
one merged row with statistics in common. Merging moves nothing: place p of the flat result is patch p of [P, C]. The
backward walks the tiles with a number of programs that does not depend on the device, as that of rms_norm does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.triton_support import accumulator, stages, sum_partials

LARGEST = 8192  # elements of a tile that is held in registers
TILE = 4096  # elements of a tile, where patches are shorter
PROGRAMS = 256  # of the backward, at most: about two for each multiprocessor of an H100 or H200


class Backend:
    """The triton backend. Where order is wrong the result is NaN, or the gradient of a patch without a place."""

    @staticmethod
    def refuses(x: Tensor, weight: Tensor) -> str | None:
        tile = _tile(x, weight)
        if tile["PLACES"] * tile["BLOCK"] > LARGEST:
            return f"holds rows of up to {LARGEST} values (each patch padded to a power of two), not {len(weight)}"
        return None

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, merge: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(result, mean, reciprocal standard deviation), the last two one value per normalised row."""
        x, patches, tile = x.contiguous(), x.shape[0], _tile(x, weight)
        out = x.new_empty(patches // merge, merge * x.shape[1])
        mean = x.new_empty(x.numel() // len(weight), dtype=accumulation_dtype(x.dtype))
        rstd = torch.empty_like(mean)
        if patches:
            _forward[triton.cdiv(patches, tile["STEP"]),](
                x, weight.contiguous(), bias.contiguous(), _contiguous(order), out, mean, rstd, patches,
                EPS=eps, **tile, num_warps=_warps(tile, 1024),
            )  # fmt: skip
        return out, mean, rstd

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(grad x, [grad weight, grad bias])."""
        x, order, patches, tile = x.contiguous(), _contiguous(order), x.shape[0], _tile(x, weight)
        grad_x = torch.empty_like(x)
        if not patches:
            return grad_x, weight.new_zeros(2, len(weight))
        owner = None
        if order is not None:
            owner = torch.full((patches,), -1, dtype=torch.int32, device=x.device)
            _find_owners[triton.cdiv(patches, 256),](order, owner, patches, BLOCK=256, num_warps=4)
            _mark_homeless[triton.cdiv(patches, 16),](
                owner, grad_x, patches, WIDTH=x.shape[1], ROWS=16, BLOCK=256, num_warps=4
            )
        tiles = triton.cdiv(patches, tile["STEP"])
        programs = triton.cdiv(tiles, triton.cdiv(tiles, PROGRAMS))
        partials = mean.new_empty(programs, 2 * len(weight))
        _backward[programs,](
            grad.contiguous(), x, weight.contiguous(), mean, rstd, order, owner, grad_x, partials, patches, tiles,
            **tile, STAGES=stages(tile["PLACES"] * tile["BLOCK"], grad, x), num_warps=_warps(tile, 512), maxnreg=128,
        )  # fmt: skip
        return grad_x, sum_partials(partials, weight.dtype).view(2, len(weight))


def _contiguous(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.contiguous()


def _tile(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The constants of the kernels: a tile has PLACES x BLOCK elements, of which STEP x WIDTH are in use."""
    width = x.shape[1]
    parts, block = len(weight) // width, triton.next_power_of_2(width)
    places = triton.next_power_of_2(parts) if parts > 1 else max(1, TILE // block)
    step = parts if parts > 1 else places
    return dict(WIDTH=width, JOINT=parts > 1, STEP=step, PLACES=places, BLOCK=block, ACC=accumulator(x.dtype))


def _warps(tile: dict[str, Any], elements: int) -> int:
    """Warps for a tile, with so many elements each."""
    return min(16, max(4, tile["PLACES"] * tile["BLOCK"] // elements))


@triton.jit
def _row_mean(value, WIDTH: tl.constexpr, JOINT: tl.constexpr, STEP: tl.constexpr):
    """The mean of every row of the tile, [places, 1]; JOINT: of the whole tile, [1, 1]."""
    total = tl.sum(value, 1, keep_dims=True)
    if JOINT:
        return tl.sum(total, 0, keep_dims=True) / (STEP * WIDTH)
    else:
        return total / WIDTH


@triton.jit
def _places(tile, patches, JOINT: tl.constexpr, STEP: tl.constexpr, PLACES: tl.constexpr):
    """(places of a tile, whether there are such, their rows of statistics, whether there are such), all [n, 1]."""
    part = tl.arange(0, PLACES)[:, None]
    place = (tile * STEP + part).to(tl.int64)
    if JOINT:
        row = tile + tl.zeros([1, 1], dtype=tl.int64)
        return place, part < STEP, row, row >= 0
    else:
        return place, place < patches, place, place < patches


@triton.jit
def _parameters(
    WIDTH: tl.constexpr, JOINT: tl.constexpr, STEP: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(where a tile's elements have their weight and bias, whether they have), [1, C]; JOINT: [places, C]."""
    column = tl.arange(0, BLOCK)[None, :]
    if JOINT:
        part = tl.arange(0, PLACES)[:, None]
        return part * WIDTH + column, (part < STEP) & (column < WIDTH)
    else:
        return column, column < WIDTH


@triton.jit(do_not_specialize=["patches"])
def _forward(
    x, weight, bias, order, out, mean, rstd, patches,
    EPS: tl.constexpr, WIDTH: tl.constexpr, JOINT: tl.constexpr, STEP: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    place, exists, row, row_exists = _places(tl.program_id(0), patches, JOINT, STEP, PLACES)
    mask = exists & (column < WIDTH)
    at, used = _parameters(WIDTH, JOINT, STEP, PLACES, BLOCK)
    if order is None:
        value = tl.load(x + place * WIDTH + column, mask=mask, other=0.0).to(ACC)
    else:
        patch = tl.load(order + place, mask=exists, other=0)
        known = (patch >= 0) & (patch < patches)
        value = tl.load(x + patch * WIDTH + column, mask=mask & known, other=0.0).to(ACC)
        value = tl.where(known, value, float("nan"))
    center = _row_mean(tl.where(mask, value, 0.0), WIDTH, JOINT, STEP)
    value = tl.where(mask, value - center, 0.0)
    inverse = tl.rsqrt(_row_mean(value * value, WIDTH, JOINT, STEP) + EPS)
    value = value * inverse * tl.load(weight + at, mask=used, other=0.0).to(ACC)
    value += tl.load(bias + at, mask=used, other=0.0).to(ACC)
    tl.store(out + place * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, center, mask=row_exists)
    tl.store(rstd + row, inverse, mask=row_exists)


@triton.jit(do_not_specialize=["patches"])
def _find_owners(order, owner, patches, BLOCK: tl.constexpr):
    """owner[patch] = the (last) place that it goes to; where there is none it stays -1."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    patch = tl.load(order + place, mask=place < patches, other=-1)
    # An atomic, but of integers: a maximum does not depend on the order.
    tl.atomic_max(owner + patch, place, mask=(patch >= 0) & (patch < patches), sem="relaxed")


@triton.jit(do_not_specialize=["patches"])
def _mark_homeless(owner, grad_x, patches, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """NaN for the gradient of patches without a place, of which a permutation has none."""
    patch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    homeless = tl.load(owner + patch, mask=patch < patches, other=0) < 0
    nan = tl.full([ROWS, BLOCK], float("nan"), tl.float32).to(grad_x.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        tl.store(grad_x + patch.to(tl.int64)[:, None] * WIDTH + column, nan, mask=homeless[:, None] & (column < WIDTH))


@triton.jit(do_not_specialize=["patches", "tiles"])
def _backward(
    grad, x, weight, mean, rstd, order, owner, grad_x, partials, patches, tiles,
    WIDTH: tl.constexpr, JOINT: tl.constexpr, STEP: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    at, used = _parameters(WIDTH, JOINT, STEP, PLACES, BLOCK)
    scale = tl.load(weight + at, mask=used, other=0.0).to(ACC)
    grad_weight = tl.zeros([PLACES, BLOCK], dtype=ACC)
    grad_bias = tl.zeros([PLACES, BLOCK], dtype=ACC)
    # Stages: the next tiles are on their way to shared memory while this one is worked on.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        place, exists, row, row_exists = _places(tile, patches, JOINT, STEP, PLACES)
        mask = exists & (column < WIDTH)
        upstream = tl.load(grad + place * WIDTH + column, mask=mask, other=0.0).to(ACC)
        center = tl.load(mean + row, mask=row_exists, other=0.0)
        inverse = tl.load(rstd + row, mask=row_exists, other=0.0)
        if order is None:
            target, reads, writes = place, mask, mask
        else:
            target = tl.load(order + place, mask=exists, other=0)
            known = exists & (target >= 0) & (target < patches)
            reads = mask & known
            writes = reads & (tl.load(owner + target, mask=known, other=-1) == place)
        value = tl.load(x + target * WIDTH + column, mask=reads, other=0.0).to(ACC)
        normed = (value - center) * inverse  # beyond the tile it meets an upstream of 0
        grad_weight += upstream * normed
        grad_bias += upstream
        scaled = upstream * scale
        flat = _row_mean(scaled, WIDTH, JOINT, STEP)
        projection = _row_mean(scaled * normed, WIDTH, JOINT, STEP)
        result = (scaled - flat - normed * projection) * inverse
        tl.store(grad_x + target * WIDTH + column, result.to(grad_x.dtype.element_ty), mask=writes)
    if not JOINT:
        grad_weight, grad_bias = tl.sum(grad_weight, 0, keep_dims=True), tl.sum(grad_bias, 0, keep_dims=True)
    SPAN: tl.constexpr = STEP * WIDTH if JOINT else WIDTH
    partials += tl.program_id(0) * 2 * SPAN
    tl.store(partials + at, grad_weight, mask=used)
    tl.store(partials + SPAN + at, grad_bias, mask=used)
