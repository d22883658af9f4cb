"""The Triton vision_attention compiles for sm_90a: no spill, all products wgmma, asynchronous copies; D = 72 too."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.vision_attention.triton import Backend
from tests.kernels.aot.record import Resources, meta
from tests.kernels.aot.test_prefix_attention import ATTENTION, SCHEDULE, slow

PATCHES, IMAGES, HEADS = 57600, 16, 16


def compiled(recording, head_dim: int, dtype: torch.dtype) -> list[Resources]:
    q = meta(PATCHES, HEADS, head_dim, dtype=dtype)
    boundaries = meta(IMAGES + 1, dtype=torch.int32)
    with recording() as kernels:
        Backend.forward(q, q, q, boundaries, head_dim**-0.5)
        Backend.backward(q, q, q, q, q, meta(PATCHES, HEADS, dtype=torch.float32), boundaries, head_dim**-0.5)
    for kernel in kernels:
        kernel.assert_sound()
    assert {kernel.kernel for kernel in kernels} == SCHEDULE | ATTENTION
    return [kernel for kernel in kernels if kernel.kernel not in SCHEDULE]


@pytest.mark.parametrize("head_dim", [72, *slow(64, 80, 128)])
def test_bfloat16(head_dim: int, recording) -> None:
    for kernel in compiled(recording, head_dim, torch.bfloat16):
        kernel.assert_fast_matrices()


@pytest.mark.slow
def test_float32(recording) -> None:
    compiled(recording, 72, torch.float32)
