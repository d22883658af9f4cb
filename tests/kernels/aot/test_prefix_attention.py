"""The Triton prefix_attention compiles for sm_90a: no spill, all products wgmma, asynchronous copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import driver

from r4b_kernels import _varlen_schedule, _varlen_triton
from r4b_kernels.prefix_attention.triton import Backend
from tests.kernels.aot import record
from tests.kernels.aot.record import Resources, meta

SCHEDULE = {"_describe", "_find_runs", "_cut_runs", "_order"}
ATTENTION = {"_forward", "_backward_queries", "_backward_keys"}
TOKENS, SEGMENTS = 17056, 17


def slow(*values: int) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def launch(tokens: int, segments: int, head_dim: int, dtype: torch.dtype) -> None:
    """Forward and backward of 32 heads that share 8, on shapes alone."""
    q, k, v, grad = (meta(tokens, heads, head_dim, dtype=dtype) for heads in (32, 8, 8, 32))
    offsets, parent = meta(segments + 1, dtype=torch.int32), meta(segments, dtype=torch.int32)
    Backend.forward(q, k, v, offsets, parent, head_dim**-0.5)
    Backend.backward(grad, q, k, v, q, meta(tokens, 32, dtype=torch.float32), offsets, parent, head_dim**-0.5)


def compiled(recording, head_dim: int, dtype: torch.dtype) -> list[Resources]:
    """The three kernels of attention; the schedule's are checked here."""
    with recording() as kernels:
        launch(TOKENS, SEGMENTS, head_dim, dtype)
    for kernel in kernels:
        kernel.assert_sound()
    assert {kernel.kernel for kernel in kernels} == SCHEDULE | ATTENTION
    return [kernel for kernel in kernels if kernel.kernel not in SCHEDULE]


@pytest.mark.parametrize("head_dim", [128, *slow(32, 64, 72, 80, 96, 256)])
def test_bfloat16(head_dim: int, recording) -> None:
    for kernel in compiled(recording, head_dim, torch.bfloat16):
        # At D = 256 the keys' kernel holds 32 rows, for two accumulators of 64 would not fit: wgmma wants 64.
        if (head_dim, kernel.kernel) != (256, "_backward_keys"):
            kernel.assert_fast_matrices()


def test_no_kernel_is_compiled_anew_when_lengths_change() -> None:
    functions = [
        getattr(module, name)
        for module, names in ((_varlen_schedule, SCHEDULE), (_varlen_triton, ATTENTION))
        for name in names
    ]
    counts = []
    for tokens, segments in ((TOKENS, SEGMENTS), (16999, 4), (1, 1), (128, 16)):
        with record.recording():
            launch(tokens, segments, 128, torch.bfloat16)
        counts.append([sum(len(cache[0]) for cache in function.device_caches.values()) for function in functions])
    assert min(counts[0]) > 0 and all(count == counts[0] for count in counts), counts


@pytest.mark.slow
def test_float16(recording) -> None:
    for kernel in compiled(recording, 128, torch.float16):
        kernel.assert_fast_matrices()


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128, 256])
def test_float32(head_dim: int, recording) -> None:
    """Exact products, on the float32 units."""
    assert all(kernel.hgmma == kernel.hmma == 0 for kernel in compiled(recording, head_dim, torch.float32))


@pytest.mark.parametrize(("most", "refused"), [(101_376, True), (232_448, False)])
def test_wide_heads_are_refused_where_shared_memory_is_short(
    most: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    utilities = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": most})
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utilities))
    with FakeTensorMode():
        wide, usual = (torch.empty(4, 2, dim, dtype=torch.bfloat16, device="cuda") for dim in (256, 128))
    assert bool(_varlen_triton.refuses(wide)) is refused
    assert _varlen_triton.refuses(usual) is None
