"""Compiles csrc/ into the package's shared objects: `python -m r4b_kernels.build`, and setup.py's build step.

There are two: `cpu` (g++) and `cuda` (nvcc). Both use LibTorch's stable ABI alone and no Python symbol, so that one
build serves every torch from 2.11 on and every Python. An object's name carries the hash of its sources and flags: a
stale one is never loaded, and two builders at once write the same file. This module imports neither torch nor anything
of the package, because setup.py and the Makefile run it as a file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

KINDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
OBJECTS = PACKAGE / "_objects"
SUFFIXES = {"cpu": ".cpp", "cuda": ".cu"}
HEADERS = (".h", ".cuh")

TORCH_2_11 = "0x020b000000000000ULL"
COMMON = ("-O3", "-std=c++20", "-DNDEBUG", "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_2_11}")
# No contraction: the same bits from every compiler, and pack_groups' costs are those of Python.
CPU_FLAGS = (*COMMON, "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
# Not -arch=sm_90a, which adds a pass that knows no wgmma.
CUDA_FLAGS = (
    *COMMON,
    "-DUSE_CUDA",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)


_UNWANTED = "this torch has no CUDA, or R4B_BUILD_CUDA=0; R4B_BUILD_CUDA=1 builds it all the same"


class BuildError(RuntimeError):
    """A source does not compile, or an object was asked for that cannot be built here."""


def sources(kind: str) -> list[Path]:
    """The translation units of an object, in a fixed order."""
    return sorted((SOURCES / kind).glob(f"*{SUFFIXES[kind]}"))


def flags(kind: str) -> tuple[str, ...]:
    """The compile flags, which depend on the processor's architecture alone."""
    if kind == "cuda":
        return CUDA_FLAGS
    # AVX2 and FMA: what torch itself asks for above its plain code path; the loader checks that the CPU has them.
    return (*CPU_FLAGS, "-march=x86-64-v3") if platform.machine() in ("x86_64", "AMD64") else CPU_FLAGS


@cache
def object_name(kind: str) -> str:
    """File name of the object that the sources of today make."""
    digest = hashlib.sha256("\0".join((platform.system(), platform.machine(), *flags(kind))).encode())
    headers = [path for folder in (SOURCES, SOURCES / kind) for path in folder.glob("*") if path.suffix in HEADERS]
    for path in [*sources(kind), *sorted(headers)]:
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{kind}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where objects go when the package's folder is not writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r4b_kernels"


def find(kind: str) -> Path | None:
    """The built object, if it is there and up to date."""
    return next((path for folder in (OBJECTS, cache_folder()) if (path := folder / object_name(kind)).is_file()), None)


def why_not(kind: str) -> str | None:
    """None if the object can be built here, else what is missing."""
    if platform.system() != "Linux":
        return f"is built on Linux only, this is {platform.system()}"
    if not sources(kind):
        return f"has no sources in {SOURCES / kind}"
    if _torch() is None:
        return "torch is not installed here (in an isolated build it never is)"
    if _compiler(kind) is None:
        needed = "nvcc (CUDA_HOME, CUDA_PATH or PATH)" if kind == "cuda" else os.environ.get("CXX") or "g++ or clang++"
        return f"there is no {needed}"
    return None


def wanted() -> list[str]:
    """The objects to build: cpu where it can be, cuda as R4B_BUILD_CUDA says.

    "0" never, "1" always (an error where nvcc is missing), "auto" where there are nvcc and a CUDA build of torch.

    Raises:
        BuildError: for another value, and for "1" without nvcc.
    """
    switch = os.environ.get("R4B_BUILD_CUDA") or "auto"
    if switch not in ("auto", "0", "1"):
        raise BuildError(f"R4B_BUILD_CUDA={switch!r}: must be auto, 0 or 1")
    kinds = [] if why_not("cpu") else ["cpu"]
    if switch == "1" and (reason := why_not("cuda")) is not None:
        raise BuildError(f"R4B_BUILD_CUDA=1, but {reason}")
    if switch == "1" or (switch == "auto" and why_not("cuda") is None and _torch_has_cuda()):
        kinds.append("cuda")
    return kinds


def build(kind: str, folder: Path | None = None, jobs: int = 2) -> Path:
    """Compile one object, or take the one that is up to date, and return its path in ``folder``.

    Args:
        kind: "cpu" or "cuda".
        folder: where to put it; by default the package's folder, or the cache where that is not writable.
        jobs: sources compiled at once.

    Raises:
        BuildError: with the compiler's own words.
    """
    found = find(kind)
    if found is not None and folder in (None, found.parent):
        return found
    target = (folder or _writable_folder()) / object_name(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
        made = Path(scratch) / target.name
        if found is not None:
            shutil.copy(found, made)
        else:
            _compile(kind, made, jobs)
        made.replace(target)
    if folder is None:
        for stale in target.parent.glob(f"{kind}-*.so"):
            if stale != target:
                stale.unlink(missing_ok=True)
    return target


def _compile(kind: str, target: Path, jobs: int) -> None:
    if (reason := why_not(kind)) is not None:
        raise BuildError(f"the {kind} object: {reason}")
    compiler, torch = str(_compiler(kind)), Path(str(_torch()))
    headers = ("-isystem", str(torch / "include"), f"-I{SOURCES}")
    units = [(source, target.with_name(f"{source.stem}.o")) for source in sources(kind)]

    def compile_unit(source: Path, unit: Path) -> None:
        _run([compiler, *flags(kind), *headers, "-c", str(source), "-o", str(unit)])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: compile_unit(*pair), units))
    # libtorch.so brings libtorch_cuda in where there is one; nothing of ours names it, hence --no-as-needed. Some
    # builds of torch export parts of the C++ library: the system's own comes first.
    libraries = ["-lstdc++", f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    if kind == "cpu":
        link = ["-shared", "-Wl,--no-as-needed", *libraries]
    else:
        link = ["-shared", "-cudart", "static", "-Xlinker", "--no-as-needed", *libraries]
    _run([compiler, *(str(unit) for _, unit in units), *link, "-o", str(target)])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr, end="")


def _compiler(kind: str) -> str | None:
    if kind == "cpu":
        named = os.environ.get("CXX")
        return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name) and (found := shutil.which("nvcc", path=os.path.join(os.environ[name], "bin"))):
            return found
    return shutil.which("nvcc")


def _torch() -> Path | None:
    """torch's folder, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _torch_has_cuda() -> bool:
    torch = _torch()
    version = torch / "version.py" if torch else None
    return version is not None and bool(re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE))


def _writable_folder() -> Path:
    return OBJECTS if os.access(PACKAGE, os.W_OK) else cache_folder()


def setup_options() -> dict[str, Any]:
    """Arguments of setuptools.setup() that put the objects into a wheel; {} where none can be built."""
    kinds = wanted()
    if not kinds:
        print(f"r4b_kernels: no compiled objects: {why_not('cpu')}", file=sys.stderr)
        return {}
    from setuptools import Distribution
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class BuildObjects(build_py):
        def run(self) -> None:
            super().run()
            folder = None if self.editable_mode else Path(self.build_lib) / "r4b_kernels" / OBJECTS.name
            for kind in kinds:
                try:
                    build(kind, folder)
                except BuildError as error:  # a compiler too old must not keep anyone from the rest of the package
                    if os.environ.get("R4B_BUILD_CUDA") == "1":
                        raise
                    print(f"r4b_kernels: {kind} not built: {error}", file=sys.stderr)

    class AnyPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    class WithObjects(Distribution):
        def has_ext_modules(self) -> bool:
            return True

    return {"cmdclass": {"build_py": BuildObjects, "bdist_wheel": AnyPython}, "distclass": WithObjects}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what is wanted here. 0 also where there is no compiler: the package works without."""
    parser = argparse.ArgumentParser(prog="python -m r4b_kernels.build", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="folder to write to (default: the package, or the cache)")
    parser.add_argument("--jobs", type=int, default=2, help="sources compiled at once (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="say nothing where there is nothing to do")
    options = parser.parse_args(arguments)
    try:
        kinds = wanted()
        for kind in KINDS:
            if kind not in kinds:
                if not options.quiet:
                    print(f"r4b_kernels: {kind} not built: {why_not(kind) or _UNWANTED}")
                continue
            there = find(kind) is not None
            if not there:
                print(f"r4b_kernels: compiling {kind}: {', '.join(path.name for path in sources(kind))}", flush=True)
            path = build(kind, options.out, options.jobs)
            if not (there and options.quiet):
                print(f"r4b_kernels: {path}")
    except BuildError as error:
        print(f"r4b_kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
