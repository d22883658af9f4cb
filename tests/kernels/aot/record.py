"""Compiles Triton launchers for sm_90a without a GPU or a driver, and reads what the assembler made of them.

The launcher itself runs, on meta tensors, so that every launch is specialised (divisibility by 16, equality to 1,
constexprs) as it would be on a GPU; only the last step, the launch, is left out.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"
SHARED_LIMIT = 232_448  # bytes of shared memory a block may have on an H100 or H200
SMALL_SHARED_LIMIT = 101_376  # on GPUs of compute capability 8.6, 8.9 and 12.0, the smallest of those from 8.0 on


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Instructions are counted in the machine code, not in a run.

    Attributes:
        kernel: the kernel's name.
        warps: warps per block.
        registers: registers per thread.
        stack: bytes of stack per thread; more than 0 means that registers spill.
        spills: loads from and stores to local memory.
        shared: bytes of shared memory per block, static and dynamic.
        hgmma: asynchronous warp-group matrix instructions (wgmma).
        hmma: warp-level matrix instructions: on sm_90 the slow way.
        async_copies: asynchronous copies from global to shared memory (cp.async, TMA).
        wide_loads: loads and asynchronous copies of 16 bytes a thread from global memory.
    """

    kernel: str
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    async_copies: int
    wide_loads: int = 0

    def assert_sound(self) -> None:
        """No spill, and shared memory within the limit."""
        assert self.stack == 0 and self.spills == 0, f"spills: {self}"
        assert self.shared <= SHARED_LIMIT, f"too much shared memory: {self}"

    def assert_fast_matrices(self) -> None:
        """Sound, with every product a wgmma and asynchronous copies to feed them."""
        self.assert_sound()
        assert self.hgmma > 0 and self.hmma == 0, f"not all products are wgmma: {self}"
        assert self.async_copies > 0, f"no asynchronous copies: {self}"


class _Driver:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed while compiling without a GPU: give the kernel fixed configurations")


@contextlib.contextmanager
def recording() -> Iterator[list[Resources]]:
    """Every launch inside the block is compiled instead, and its resources are appended to the list."""
    recorded: list[Resources] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append(_resources(self.fn.__name__, kernel))
        return kernel

    driver.set_active(_Driver())
    JITFunction.run = compile_only
    try:
        yield recorded
    finally:
        JITFunction.run = run
        driver._active = active


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _resources(name: str, kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}

    def count(*opcodes: str) -> int:
        return sum(len(re.findall(rf"\b{opcode}\b", code)) for opcode in opcodes)

    return Resources(
        kernel=name,
        warps=kernel.metadata.num_warps,
        registers=used["REG"],
        stack=used["STACK"],
        spills=count("LDL", "STL"),
        shared=kernel.metadata.shared,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        async_copies=count("LDGSTS", "UTMALDG"),
        wide_loads=count(r"LDG(?:STS)?\.E(?:\.\w+)*\.128"),
    )
