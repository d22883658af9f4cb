"""Where the benchmarks run, how fast that is, and how time is taken there.

On a GPU: bfloat16, device time by CUDA events, the least of turns, with a cold L2 before every call. On a CPU: float32,
host time, the least of turns. Turns (us, a rival, the next, us again, ...) burden all alike with what else is running.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Cycles that a GPU is kept busy before a call, about a millisecond: the call's launches are queued by then, and what is
# timed is the device, not Python. A call that waits for the device in between pays for its launches after that.
HEAD_START = 2**21
T = TypeVar("T")


def on(cpu: T, gpu: T) -> T:
    """The one of two values that is for this machine."""
    return gpu if ON_GPU else cpu


@dataclass(frozen=True)
class Ceiling:
    """What this machine does at best, measured here and now: matmul FLOP/s in ``DTYPE``, copied bytes/s both ways."""

    flops: float
    bytes: float

    def floor(self, flops: float, bytes_moved: float) -> float:
        """The least seconds for so much work."""
        return max(flops / self.flops, bytes_moved / self.bytes)


def measure_ceiling() -> Ceiling:
    """A matmul of random matrices (zeros are faster on a GPU, and nobody trains on them) and a copy."""
    size = on(768, 8192)
    a, b = (torch.randn(size, size, dtype=DTYPE, device=DEVICE) for _ in range(2))
    source = torch.randn(on(2**23, 2**28), dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    best = least_seconds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceiling(2 * size**3 / best["matmul"], 2 * source.nbytes / best["copy"])


def least_seconds(functions: dict[str, Callable[[], Any]], budget: float = 2.0, rounds: int = 15) -> dict[str, float]:
    """The least time of a call to each, in turns, after two to warm up; at most ``rounds`` and about ``budget`` s."""
    for function in functions.values():
        function()
        function()
    best = dict.fromkeys(functions, float("inf"))
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function))
        if time.perf_counter() - begin > budget:
            break
    return best


def seconds(function: Callable[[], Any]) -> float:
    """The time of one call, on the device's clock where there is one."""
    if not ON_GPU:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cold_cache().zero_()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _cold_cache() -> Tensor:
    """Memory larger than any GPU's L2: writing it evicts what the last call left there."""
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Device memory that a call takes beyond what was there before (GPU only)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
