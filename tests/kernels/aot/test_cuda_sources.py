"""csrc/cuda compiles for sm_90a without a warning or a spill, with wgmma and TMA in attention; its object registers."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from r4b_kernels import build
from tests.kernels.aot.record import TOOLS, Resources

OBSTACLE = build.why_not("cuda")
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"the cuda object cannot be compiled here: {OBSTACLE}")

REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object; what the compiler said lies beside it. Kept between runs for as long as the sources stay."""
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    folder = cache.mkdir("cuda_object") if cache else tmp_path_factory.mktemp("cuda_object")
    target = folder / build.object_name("cuda")
    if not target.with_suffix(".log").exists():
        for stale in folder.iterdir():
            stale.unlink()
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            build._compile("cuda", target, jobs=2)
        target.with_suffix(".log").write_text(said.getvalue())
    return target


@pytest.fixture(scope="module")
def code(compiled: Path) -> dict[str, str]:
    """Machine code by kernel."""
    listing = _cuobjdump("--dump-sass", compiled)
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)[1:]
    return {_plain(name): text for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture(scope="module")
def usage(compiled: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED and so on by kernel."""
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", _cuobjdump("--dump-resource-usage", compiled))
    return {_plain(name): {key: int(x) for key, x in re.findall(r"(\w+):(\d+)", text)} for name, text in found}


def _cuobjdump(flag: str, path: Path) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, path], capture_output=True, text=True, check=True).stdout


def _plain(mangled: str) -> str:
    """attention_forward<128> of its mangled name."""
    name, argument = re.search(r"\d(attention_forward|build_schedule|advantages)(?:ILi(\d+)E)?", mangled).groups()  # type: ignore[union-attr]
    return f"{name}<{argument}>" if argument else name


def _count(code: str, *opcodes: str) -> int:
    return sum(len(re.findall(rf"\b{opcode}\b", code)) for opcode in opcodes)


KERNELS = {"attention_forward<64>": 12, "attention_forward<128>": 12, "build_schedule<1024>": 32, "advantages": 8}


def test_nothing_is_missed_and_no_warning(compiled: Path, code: dict[str, str]) -> None:
    """C7510, among others, would say that the assembler waits after every wgmma."""
    assert set(code) == set(KERNELS)
    assert compiled.with_suffix(".log").read_text() == ""


@pytest.mark.parametrize("kernel", KERNELS)
def test_resources(
    kernel: str, code: dict[str, str], usage: dict[str, dict[str, int]], record_property: Callable[[str, Any], None]
) -> None:
    used = Resources(
        kernel=kernel,
        warps=KERNELS[kernel],
        registers=usage[kernel]["REG"],
        stack=usage[kernel]["STACK"] + usage[kernel]["LOCAL"],
        spills=_count(code[kernel], "LDL", "STL"),
        shared=usage[kernel]["SHARED"] + _dynamic_shared(kernel),
        hgmma=_count(code[kernel], "HGMMA"),
        hmma=_count(code[kernel], "HMMA"),
        async_copies=_count(code[kernel], "UTMALDG"),
    )
    record_property("kernel", asdict(used))
    used.assert_sound()
    assert used.registers * used.warps * 32 <= REGISTERS
    if kernel.startswith("attention"):
        used.assert_fast_matrices()


def _dynamic_shared(kernel: str) -> int:
    """Q, three stages of K and of V, 14 barriers, and what it takes to align them."""
    dim = re.search(r"attention_forward<(\d+)>", kernel)
    return 7 * 128 * int(dim[1]) * 2 + 14 * 8 + 1024 if dim else 0


@pytest.mark.parametrize("dim", [64, 128])
def test_attention_overlaps(dim: int, code: dict[str, str]) -> None:
    """In the loop the products of the next scores and of the last weights are issued together, and only the first group
    is waited for before the softmax."""
    pattern = r"HGMMA[.\w]*|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2"
    steps = re.findall(pattern, code[f"attention_forward<{dim}>"])
    order = "".join({"H": "m", "M": "e", "W": step[-1]}[step[0]] for step in steps)
    products = dim // 16 + 8
    assert re.search(rf"m{{{products}}}1e{{64,}}0", order), order


@pytest.mark.parametrize("dim", [64, 128])
def test_attention_register_quotas(dim: int, code: dict[str, str]) -> None:
    """setmaxnreg: what the warpgroups ask for is there, and no instruction uses a register beyond it."""
    text = code[f"attention_forward<{dim}>"]
    raised = int(re.search(r"USETMAXREG\.TRY_ALLOC\S* \S+ (0x\w+)", text)[1], 16)  # type: ignore[index]
    lowered = int(re.search(r"USETMAXREG\.DEALLOC\S* (0x\w+)", text)[1], 16)  # type: ignore[index]
    assert (2 * raised + lowered) * 128 <= REGISTERS
    assert max(int(register) for register in re.findall(r"\bR(\d+)\b", text)) < raised


LOAD = """
import ctypes, os, sys, torch
from r4b_kernels.group_advantage import cuda as advantages
from r4b_kernels.prefix_attention import cuda as attention

ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)
for name in ("group_advantage", "prefix_schedule", "prefix_attention"):
    op = getattr(torch.ops.r4b_native, name).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"), name

q, integers = torch.zeros(8, 2, 64, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
arguments = (q, q, q, integers, integers[:1])


def only_schedule(*_):
    return integers


for prepare in (None, only_schedule):
    attention.schedule = prepare or attention.schedule
    for call in (
        lambda: attention.Backend.forward(*arguments, 0.125),
        lambda: advantages.forward(torch.zeros(1), integers, integers[:1], "union", True, 1e-6, integers, 0),
    ):
        try:
            call()
        except NotImplementedError as error:
            print(str(error).splitlines()[0].split("'")[1])
"""


def test_the_object_loads_and_takes_the_bindings_calls(compiled: Path) -> None:
    """Symbols are looked up late, so that a torch without CUDA will do; its dispatcher matches the arguments with the
    schema before it finds that there is no kernel for the CPU."""
    paths = os.pathsep.join([str(build.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(compiled)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "r4b_native::prefix_schedule",
        "r4b_native::group_advantage",
        "r4b_native::prefix_attention",
        "r4b_native::group_advantage",
    ]
