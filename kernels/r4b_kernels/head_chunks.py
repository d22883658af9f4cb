"""What the backends of the head ops share: rows in chunks, exact products into float32, and gradients summed in it.

A head op walks over chunks of rows. Each chunk's logits live in one buffer, are reduced, become their own gradient and
enter two more products; the logits of all rows never exist together. Chunks depend on shapes alone, so results repeat
bit by bit. Everything here runs on any device; on ``meta`` too, where nothing can be read and every row counts as live.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels.precision import accumulation_dtype
from r4b_kernels.vocabulary import sum_over

# Logits of one chunk on the CPU: small enough for the last-level cache, with enough rows to feed a matrix product.
_CHUNK_ELEMENTS = 1 << 21
_MIN_ROWS = 64
# On a GPU chunks are as long as memory allows, because each of them reads and writes the whole weight gradient; and a
# multiple of what the tiles of a matrix product span.
_CHUNK_BYTES = 1 << 30
_TILE = 128
# Columns of a half-precision weight that are widened at a time where a device has no product into float32.
_WIDEN_ELEMENTS = 1 << 20


def chunk_rows(num_rows: int, vocabulary: int, element_size: int, on_cpu: bool) -> int:
    """Rows of logits in a chunk; on a GPU the chunks are of about equal length."""
    if on_cpu:
        return max(1, min(num_rows, max(_MIN_ROWS, _CHUNK_ELEMENTS // vocabulary)))
    most = max(_TILE, _CHUNK_BYTES // (vocabulary * element_size) // _TILE * _TILE)
    chunks = max(1, -(-num_rows // most))
    return max(1, min(num_rows, -(-num_rows // (chunks * _TILE)) * _TILE))


class ChunkBuffers:
    """The workspace of a call: logits [rows, V] in the accumulation dtype; a second such buffer for who asks for it."""

    def __init__(self, num_rows: int, hidden: Tensor, weight: Tensor) -> None:
        dtype, self.vocabulary = accumulation_dtype(hidden.dtype), weight.shape[0]
        self.rows = chunk_rows(num_rows, self.vocabulary, dtype.itemsize, hidden.device.type == "cpu")
        self._logits = torch.empty(min(num_rows, self.rows), self.vocabulary, dtype=dtype, device=hidden.device)

    @cached_property
    def _second(self) -> Tensor:
        return torch.empty_like(self._logits)

    def chunks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.rows):
            yield slice(start, min(start + self.rows, num_rows))

    def logits(self, hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        """hidden @ weight.T / temperature in the first buffer, as a view [rows of hidden, V]."""
        return product(hidden, weight.T, self._logits[: hidden.shape[0]], 1.0 / temperature)

    def exp(self, z: Tensor) -> Tensor:
        """exp(z) in the second buffer."""
        return torch.exp(z, out=self._second[: z.shape[0]])


def narrow_view(z: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, V] of ``dtype`` in the memory of ``z`` [rows, V], each row at the beginning of its row there.

    For kernels that replace logits by something narrower: whoever goes through a row from its left, and reads a block
    before writing one, never overwrites what it has not read.
    """
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]


def product(a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, add: bool = False) -> Tensor:
    """out = alpha * a @ b, or out += with ``add``; a and b may be of half precision.

    Products of half-precision numbers are exact in float32 and are summed there: nothing is rounded to half precision
    on the way to a float32 ``out``. cuBLAS does so by itself, through ``out_dtype``; the CPU has no such product, so
    there b is widened in blocks of its longer side.
    """
    beta = 1.0 if add else 0.0
    if out.is_meta:
        return out  # torch 2.11 cannot trace the product into another dtype
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if out.device.type != "cpu":
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    a = a.to(out.dtype)
    inner, columns = b.shape
    step = max(1, _WIDEN_ELEMENTS // max(1, min(inner, columns)))
    for start in range(0, max(inner, columns), step):
        block = slice(start, start + step)
        if columns >= inner:
            out[:, block].addmm_(a, b[:, block].to(out.dtype), beta=beta, alpha=alpha)
        else:
            out.addmm_(a[:, block], b[block].to(out.dtype), beta=1.0 if start else beta, alpha=alpha)
    return out


class RowSubset:
    """Some rows, in chunks: slices where they are all of them, so that nothing is copied."""

    def __init__(self, index: Tensor | None, count: int) -> None:
        self.index = index
        self.count = count

    def __getitem__(self, chunk: slice) -> slice | Tensor:
        return chunk if self.index is None else self.index[chunk]


def split_rows(*masks: Tensor) -> list[RowSubset]:
    """The rows of each of some disjoint masks [T], in order. Waits for the device once, for how many there are."""
    total = masks[0].numel()
    if masks[0].is_meta:
        return [RowSubset(None, total), *(RowSubset(mask.nonzero_static(size=0)[:, 0], 0) for mask in masks[1:])]
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [
        RowSubset(None if count == total else mask.nonzero_static(size=count)[:, 0], count)
        for mask, count in zip(masks, counts, strict=True)
    ]


def local_columns(target: Tensor, weight: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(column of the target in this shard, clamped into it; whether it really lies there), both [rows, 1]."""
    column = (target - start)[:, None]
    inside = (column >= 0) & (column < weight.shape[0])
    return column.clamp(0, weight.shape[0] - 1), inside


class GradientAccumulator:
    """Sums chunks of logit gradients into hidden's and weight's; the weight's sum is kept in float32 (or float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> None:
        self.weight = weight
        self.accumulate = accumulation_dtype(weight.dtype)
        self.grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        self.grad_weight = (
            torch.empty(weight.shape, dtype=self.accumulate, device=weight.device) if need_weight else None
        )
        self._started = False

    def add(self, index: slice | Tensor, grad_z: Tensor, hidden: Tensor, row_scale: Tensor | None = None) -> None:
        """Add the gradients of some rows.

        Args:
            index: which rows of hidden they are.
            grad_z: [rows, V], gradient of their logits, the temperature included; of the accumulation dtype on the
                CPU, else of hidden's. May be overwritten afterwards.
            hidden: [rows, H], those rows of hidden.
            row_scale: [rows], of the accumulation dtype: the gradient is ``row_scale[:, None] * grad_z``.
        """
        if self.grad_hidden is not None:
            if grad_z.dtype == self.weight.dtype:
                rows = torch.empty(hidden.shape, dtype=self.accumulate, device=hidden.device)
                product(grad_z, self.weight, rows)
            else:
                # The CPU's half-precision product is several times as fast as a widened one, and the result, unlike
                # the logits and weight's sum, is of half precision anyway.
                rows = grad_z.to(self.weight.dtype) @ self.weight
            if row_scale is not None:
                rows.mul_(row_scale[:, None])
            self._store(index, rows)
        if self.grad_weight is not None:
            scaled = hidden if row_scale is None else (hidden * row_scale[:, None]).to(hidden.dtype)
            product(grad_z.T, scaled, self.grad_weight, add=self._started)
            self._started = True

    def _store(self, index: slice | Tensor, rows: Tensor) -> None:
        assert self.grad_hidden is not None
        if isinstance(index, slice):
            self.grad_hidden[index] = rows
        else:
            self.grad_hidden.index_copy_(0, index, rows.to(self.grad_hidden.dtype))

    def exact_result(self, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """(grad hidden, summed over the ranks; grad weight in the accumulation dtype); empty where not asked for."""
        grad_hidden = self.weight.new_empty(0) if self.grad_hidden is None else sum_over(self.grad_hidden, ranks)
        if self.grad_weight is None:
            return grad_hidden, self.weight.new_empty(0, dtype=self.accumulate)
        return grad_hidden, self.grad_weight if self._started else self.grad_weight.zero_()

    def result(self, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The same, with grad weight rounded to weight's dtype."""
        grad_hidden, grad_weight = self.exact_result(ranks)
        return grad_hidden, grad_weight.to(self.weight.dtype)
