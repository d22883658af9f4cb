"""The compiled CPU object: how it is built, found and refused, what it links to; its ops against the definitions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r4b_kernels import build, dispatch, native, qk_norm_mrope, rms_norm, scatter_vision
from tests.kernels.head_cases import assert_close, results_and_gradients

CPU = torch.device("cpu")
PACKAGE = Path(build.__file__).parent
needs_compiler = pytest.mark.skipif(
    build._compiler("cpu") is None or build.why_not("cpu") is not None, reason="no compiler to build with"
)

TINY = """
#include "stable.h"
namespace { void twice(const Tensor& x) { *x.mutable_data_ptr<float>() *= 2.0f; } }
STABLE_TORCH_LIBRARY_FRAGMENT(r4b_tiny, library) { library.def("twice(Tensor(a!) x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(r4b_tiny, CPU, library) { library.impl("twice", TORCH_BOX(&twice)); }
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package folder of its own with one tiny source, and nothing built."""
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "tiny.cpp").write_text(TINY)
    shutil.copy(build.SOURCES / "stable.h", sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "_objects")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("R4B_BUILD_CUDA", "0")
    build.object_name.cache_clear()
    native._load.cache_clear()
    yield tmp_path
    build.object_name.cache_clear()
    native._load.cache_clear()


@needs_compiler
def test_a_source_becomes_an_op(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([]) == 0
    assert "compiling cpu: tiny.cpp" in capsys.readouterr().out
    (made,) = (elsewhere / "_objects").iterdir()
    assert made == build.find("cpu") and native.cpu_available(CPU) is None
    x = torch.tensor([3.0])
    torch.ops.r4b_tiny.twice(x)
    assert x.item() == 6.0

    before = made.stat().st_mtime_ns
    assert build.main(["--quiet"]) == 0 and capsys.readouterr().out == ""
    assert made.stat().st_mtime_ns == before
    # Another source, another object: the stale one is neither found nor kept.
    (elsewhere / "csrc" / "cpu" / "tiny.cpp").write_text(TINY.replace("r4b_tiny", "r4b_tinier"))
    build.object_name.cache_clear()
    assert build.find("cpu") is None
    build.build("cpu")
    assert [path.name for path in (elsewhere / "_objects").iterdir()] == [build.object_name("cpu")] != [made.name]


@needs_compiler
def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "csrc" / "cpu" / "tiny.cpp").write_text("int f() { return nothing; }")
    assert build.main([]) == 1
    assert "'nothing' was not declared" in re.sub("[‘’]", "'", capsys.readouterr().err)
    assert list((elsewhere / "_objects").iterdir()) == []


def test_without_a_compiler_the_reason_is_told_and_torch_serves(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    assert build.main([]) == 0
    assert "cpu not built: there is no g++ or clang++" in capsys.readouterr().out
    rows = {(op, backend): reason for op, backend, reason in dispatch.table(CPU)}
    assert rows["rms_norm", "native"].startswith("not built: there is no g++ or clang++")
    assert rows["rms_norm", "cpu"] == "chosen"
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight), rms_norm(x, weight, backend="reference"))
    with pytest.raises(dispatch.BackendError, match="native.*not built.*can: cpu"):
        rms_norm(x, weight, backend="native")


@needs_compiler
def test_a_missing_object_says_how_to_build_it(elsewhere: Path) -> None:
    assert native.cpu_available(CPU) == "not built: run `python -m r4b_kernels.build`"
    assert native.cpu_available(torch.device("meta")) == "runs on cpu, the input is on meta"
    reason = native.cuda_available(CPU)
    assert reason == "runs on cuda, the input is on cpu"


@needs_compiler
def test_an_object_that_does_not_load_says_so(elsewhere: Path) -> None:
    build.OBJECTS.mkdir()
    (build.OBJECTS / build.object_name("cpu")).write_text("not a shared object")
    assert "does not load" in str(native.cpu_available(CPU))


def test_a_cpu_without_avx2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.find("cpu") is None or "-march=x86-64-v3" not in build.flags("cpu"):
        pytest.skip("no object for x86-64 here")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    native._load.cache_clear()
    try:
        assert native.cpu_available(CPU) == "needs a CPU with AVX2 and FMA; torch's CPU capability is DEFAULT"
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize(
    ("switch", "cuda_torch", "nvcc", "expected"),
    [
        ("0", True, True, []),
        ("auto", True, True, ["cuda"]),
        ("auto", True, False, []),
        ("auto", False, True, []),
        ("1", False, True, ["cuda"]),
        ("1", True, False, "R4B_BUILD_CUDA=1, but there is no nvcc"),
        ("yes", True, True, "R4B_BUILD_CUDA='yes': must be auto, 0 or 1"),
    ],
)
def test_the_cuda_switch(
    switch: str, cuda_torch: bool, nvcc: bool, expected: list[str] | str, elsewhere: Path, monkeypatch
) -> None:
    (elsewhere / "csrc" / "cuda").mkdir()
    (elsewhere / "csrc" / "cuda" / "op.cu").touch()
    monkeypatch.setenv("R4B_BUILD_CUDA", switch)
    monkeypatch.setattr(build, "_torch_has_cuda", lambda: cuda_torch)
    monkeypatch.setattr(build, "_compiler", lambda kind: "nvcc" if kind == "cuda" and nvcc else None)
    if isinstance(expected, list):
        assert build.wanted() == expected
    else:
        with pytest.raises(build.BuildError, match=expected.split(" (")[0]):
            build.wanted()


def test_building_imports_no_torch() -> None:
    """setup.py and the Makefile run it in environments without torch, and before every target."""
    program = f"import runpy, sys; runpy.run_path({str(PACKAGE / 'build.py')!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_object_uses_the_stable_abi_alone() -> None:
    """Undefined symbols carry the version of the C and C++ libraries, or are entries of LibTorch's C shim."""
    path = build.find("cpu")
    assert path is not None, "run `python -m r4b_kernels.build`"
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True)
    symbols = [line.split() for line in listing.stdout.splitlines()]
    foreign = {name for kind, name in symbols if "@" not in name and kind == "U"}
    assert {name for name in foreign if not name.startswith(("aoti_torch_", "torch_"))} == set()
    assert "torch_parallel_for" in foreign
    assert not any(name.startswith(("Py", "_Py")) or "c10" in name for _, name in symbols)


def _rms_norm(backend: str | None) -> Callable:
    return lambda x, weight: rms_norm(x, weight, eps=1e-5, backend=backend)


def _mrope(positions: Tensor, sections: tuple[int, ...] | None, backend: str | None) -> Callable:
    return lambda q, k, q_weight, k_weight: qk_norm_mrope(
        q, k, q_weight, k_weight, positions, theta=1e4, sections=sections, backend=backend
    )


def _agree(op: Callable[[str | None], Callable], inputs: tuple[Tensor, ...], seeds: list[Tensor]) -> None:
    """float32 in C++ against the definition in float64: values and every gradient."""
    ours = results_and_gradients(op("native"), inputs, seeds)
    exact = results_and_gradients(op("reference"), tuple(x.double() for x in inputs), seeds)
    assert_close(ours, exact, 2e-6)
    again = results_and_gradients(op("native"), inputs, seeds)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())


@needs_compiler
@pytest.mark.parametrize("shape", [(5,), (0, 8), (1, 7), (2, 3, 8), (17, 9), (5, 255), (40, 128), (700, 33)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    _agree(_rms_norm, (torch.randn(shape), torch.randn(shape[-1])), [torch.randn(shape).double()])


@needs_compiler
def test_rms_norm_of_strided_rows_and_other_weights() -> None:
    wide, seeds = torch.randn(24, 9), [torch.randn(9, 12).double()]
    _agree(lambda backend: lambda x, w: _rms_norm(backend)(x.T[:, ::2], w[::2]), (wide, torch.randn(24)), seeds)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float64, 2e-6)):
        inputs = (torch.randn(9, 12), torch.randn(12).to(dtype))
        ours = results_and_gradients(_rms_norm("native"), inputs, seeds)
        exact = results_and_gradients(_rms_norm("reference"), inputs, seeds)
        assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in exact.items()}
        assert_close(ours, exact, tolerance)


@needs_compiler
@pytest.mark.parametrize("dim", [2, 6, 16, 18, 32, 72, 128])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_qk_norm_mrope(tokens: int, dim: int) -> None:
    """The heads are slices of one projection, as in a decoder layer."""
    mixed = torch.randn(tokens, 5 * dim)
    positions = torch.randint(0, 3000, (3, tokens))
    sections = (dim // 2 - 2 * (dim // 6), dim // 6, dim // 6)

    def op(backend: str | None) -> Callable:
        def run(mixed: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
            q, k = mixed[:, : 4 * dim].view(-1, 4, dim)[:, ::2], mixed[:, 4 * dim :].view(-1, 1, dim)
            return _mrope(positions, sections, backend)(q, k, q_weight, k_weight)

        return run

    seeds = [torch.randn(tokens, 2, dim).double(), torch.randn(tokens, 1, dim).double()]
    inputs = (mixed, 1 + 0.1 * torch.randn(dim), 1 + 0.1 * torch.randn(dim))
    ours = results_and_gradients(op("native"), inputs, seeds)
    # Against float32: angles of positions in the thousands are defined by its rounding.
    theirs = results_and_gradients(op("reference"), inputs, seeds)
    assert_close(ours, theirs, 2e-6)


@needs_compiler
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("width", [1, 8, 13])
@pytest.mark.parametrize("uses", ["once", "several", "some", "none"])
def test_scatter_vision(uses: str, width: int, accumulate: bool) -> None:
    index = torch.full((60,), -1, dtype=torch.int32)
    rows = {"once": range(20), "several": [7, 3, 3, 7, 3, 0], "some": [19, 4, 2], "none": []}[uses]
    index[torch.randperm(60)[: len(rows)].sort().values] = torch.tensor(list(rows), dtype=torch.int32)

    def op(backend: str | None) -> Callable:
        return lambda x, f: scatter_vision(x.T, f, index, accumulate=accumulate, backend=backend)

    _agree(op, (torch.randn(width, 60), torch.randn(20, width)), [torch.randn(60, width).double()])
    for bad in (-2, 20):
        index[5] = bad
        with pytest.raises(ValueError, match=f"index holds {bad}"):
            op("native")(torch.randn(width, 60), torch.randn(20, width))


@needs_compiler
def test_threads_do_not_change_the_bits() -> None:
    x, weight, seeds = torch.randn(700, 96), torch.randn(96), [torch.randn(700, 96).double()]
    positions = torch.arange(700).expand(3, -1)
    heads = torch.randn(700, 2, 96)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norm = results_and_gradients(_rms_norm("native"), (x, weight), seeds)
            rope = results_and_gradients(
                _mrope(positions, None, "native"), (heads, heads, weight, weight), 2 * [torch.ones(700, 2, 96).double()]
            )
            runs.append([*norm.values(), *rope.values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_compiler
@pytest.mark.parametrize("op", ["rms_norm", "qk_norm_mrope", "scatter_vision"])
def test_other_dtypes_are_refused_and_served_by_the_next(op: str) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        refusal = f"{op}: backend='native' cannot serve.*is compiled for float32, got {dtype}; can: cpu"
        with pytest.raises(dispatch.BackendError, match=refusal):
            dispatch.resolve(op, CPU, "native", torch.zeros(1, dtype=dtype))
        served = dispatch.resolve(op, CPU, None, torch.zeros(1, dtype=dtype))
        assert served is importlib.import_module(f"r4b_kernels.{op}.cpu").Backend
    assert dispatch.resolve(op, CPU, None, torch.zeros(1)).__module__ == f"r4b_kernels.{op}.native"
