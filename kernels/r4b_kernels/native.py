"""Loads the compiled objects of csrc/, each at its first use, and says why one is not there."""

from __future__ import annotations

from functools import cache

import torch


def cpu_available(device: torch.device) -> str | None:
    """A predicate for backends in C++: CPU tensors, where the cpu object is built."""
    return _load("cpu") if device.type == "cpu" else f"runs on cpu, the input is on {device.type}"


def cuda_available(device: torch.device) -> str | None:
    """A predicate for backends in CUDA C++: GPUs of compute capability 9.0, where the cuda object is built."""
    if device.type != "cuda":
        return f"runs on cuda, the input is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"is compiled for compute capability 9.0, this GPU has {major}.{minor}"
    return _load("cuda")


@cache
def _load(kind: str) -> str | None:
    """None once the object is loaded, else the reason why not."""
    from r4b_kernels import build  # here, because `python -m r4b_kernels.build` imports this module first

    path = build.find(kind)
    if path is None:
        obstacle = build.why_not(kind)
        return f"not built: {obstacle or 'run `python -m r4b_kernels.build`'}"
    if kind == "cpu" and "-march=x86-64-v3" in build.flags(kind):
        # Torch's own choice of code path: below AVX2 the object's instructions would end the process.
        capability = torch.backends.cpu.get_cpu_capability()
        if not capability.startswith("AVX"):
            return f"needs a CPU with AVX2 and FMA; torch's CPU capability is {capability}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None
