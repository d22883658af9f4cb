"""GPUs by their data sheets, and the constants that say how much of a data sheet training gets.

The constants hold for every model, layout and published row alike; none is fitted to a row. Their sources are in
``docs/plan.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "bf16", "fp8"]

# Matrix products of training reach 0.8 of the data sheet alone in a benchmark on random data; inside a step power
# throttling, odd shapes and transposed operands of the backward leave three quarters of that.
MATMUL = 0.60
# Attention kernels written for the GPU at hand, causal, D = 128: cuDNN 9.19 on H200 does 0.65 forward and 0.55 backward
# of the data sheet at 8k tokens, less at shorter lengths.
ATTENTION_FORWARD = 0.60
ATTENTION_BACKWARD = 0.50
# FlashAttention 2 was written for Ampere: on Hopper its authors count it at about 0.35 of the data sheet against 0.6.
# Triton on Hopper (FlexAttention, our own kernels' goal) stands at the same share.
OTHER_ATTENTION_ON_HOPPER = 0.55
# The backward of attention computes five products where the forward computes two.
ATTENTION_BACKWARD_WORK = 2.5
# Kernels that only move memory reach 0.85 to 0.95 of what a copy does, and a copy 0.9 of the data sheet.
MEMORY = 0.80
# Unfused PyTorch reads and writes an activation about three times as often as fused norms, rope and SwiGLU do: casts to
# float32 and back, squares, products, each a pass of its own.
EAGER_PASSES = 3.0
# Collectives (NCCL, large messages) reach three quarters of a link's data sheet.
LINK = 0.75
# Communication that runs beside computation costs half its time still: it takes SMs, memory bandwidth and power, and
# the first and last of it have nothing to hide behind.
EXPOSED_WHEN_OVERLAPPED = 0.5
# A kernel launched from Python (autograd, hooks, checkpointing) takes the host 8 us; eager models read values back
# from the GPU in every micro-batch, so this time is not hidden behind the GPU's.
LAUNCH_SECONDS = 8e-6
KERNELS_PER_EAGER_LAYER = 60
# Fused layers launch a third of that, and the GPU hides it unless its own work is shorter still.
KERNELS_PER_FUSED_LAYER = 20
# Losing one of the ranks' time to the longest: lengths of unpacked samples vary by half their mean.
LENGTH_VARIATION = 0.5
# CUDA context, NCCL buffers and cuBLAS workspaces; then what the caching allocator loses to fragments.
RESERVED_BYTES = 3 * 2**30
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class GPU:
    """A data sheet: bytes, FLOP/s (dense), bytes/s. Links count one direction of one GPU.

    Attributes:
        power: board power in use as a share of the one that ``bf16`` and ``fp8`` are quoted for.
        native_flash2: FlashAttention 2 is the kernel written for it.
    """

    name: str
    memory: float
    fp32: float
    bf16: float
    fp8: float
    bandwidth: float
    nvlink: float
    network: float
    per_node: int = 8
    power: float = 1.0
    native_flash2: bool = False

    def flops(self, dtype: Precision) -> float:
        """Peak FLOP/s of matrix products, fp32 without TF32 as torch has it.

        Power goes with the cube of the clock (f V^2 with V ~ f), so a lower power limit costs its cube root.
        """
        peak = {"fp32": self.fp32, "bf16": self.bf16, "fp8": self.fp8}[dtype]
        return peak * self.power ** (1 / 3)

    def ring(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s of one rank in a collective of ``ranks`` ranks that lie ``stride`` GPUs apart.

        Inside a node NVLink; across nodes a ring leaves the node through the network card of each of its members there.
        """
        if ranks * stride <= self.per_node:
            return self.nvlink * LINK
        members = max(1, self.per_node // stride)
        return min(self.nvlink, members * self.network) * LINK


H100 = GPU("h100", 81559 * 2**20, 67e12, 989e12, 1979e12, 3.35e12, 450e9, 50e9)
H200 = replace(H100, name="h200", memory=143771 * 2**20, bandwidth=4.8e12)
GPUS = {"h100": H100, "h200": H200}
