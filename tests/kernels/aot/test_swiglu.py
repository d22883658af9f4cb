"""The Triton swiglu compiles for sm_90a without spilling."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels.swiglu.triton import Backend
from tests.kernels.aot.record import meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_swiglu(dtype: torch.dtype, recording) -> None:
    with recording() as kernels:
        Backend.forward(meta(8192, 24576, dtype=dtype))
        Backend.backward(meta(8192, 12288, dtype=dtype), meta(8192, 24576, dtype=dtype))
    assert [kernel.kernel for kernel in kernels] == ["_forward", "_backward"]
    for kernel in kernels:
        kernel.assert_sound()
