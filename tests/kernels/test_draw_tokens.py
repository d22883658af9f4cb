"""draw_tokens: every backend against the definition in float64 and against the distribution itself, edges, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from r4b_kernels import dispatch, draw_tokens, native
from r4b_kernels.draw_tokens import cpu

CPU = torch.device("cpu")
_REASON = native.cpu_available(CPU)
needs_native = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
BACKENDS = [pytest.param("native", marks=needs_native), "cpu"]
NEVER = -float("inf")


def points(rows: int) -> Tensor:
    """Evenly over [0, 1), off the edges between tokens."""
    return (torch.arange(rows, dtype=torch.float64) + 0.4142) / rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 63), (33, 64), (16, 1000)], ids=str)
def test_against_the_definition(shape: tuple[int, int], temperature: float, top_p: float, backend: str) -> None:
    torch.manual_seed(shape[1])
    rows, count = shape
    logits = 3 * torch.randn(rows, count, dtype=torch.float64).float().double()
    logits[0, count // 2 :] = NEVER if count > 1 else 0.0
    forced = torch.full((rows,), -1)
    forced[rows // 2] = count - 1
    arguments = (points(rows), forced)
    token, logprob, entropy = draw_tokens(logits, *arguments, temperature=temperature, top_p=top_p, backend="reference")
    got = draw_tokens(logits.float(), *arguments, temperature=temperature, top_p=top_p, backend=backend)
    assert got[0].dtype == torch.int64 and torch.equal(got[0], token)
    for ours, exact in ((got[1], logprob), (got[2], entropy)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, draw_tokens(
        logits.float(), *arguments, temperature=temperature, top_p=top_p, backend=backend), strict=True))  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_evenly_spaced_points_draw_every_token_in_its_proportion(backend: str) -> None:
    probability = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    rows = 2000
    logits = probability.log().float().expand(rows, -1)
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.65, [1, 3]), (0.75, [1, 3, 4]), (1e-6, [1])):
        token, logprob, _ = draw_tokens(logits, points(rows), top_p=top_p, backend=backend)
        share = torch.zeros_like(probability).index_copy(0, torch.tensor(kept), probability[kept])
        counts = torch.bincount(token, minlength=5)
        assert float((counts - rows * share / share.sum()).abs().max()) <= 1
        torch.testing.assert_close(logprob.double(), probability.log()[token])
        assert (token.diff() >= 0).all(), "the order of the vocabulary"


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_edges(backend: str) -> None:
    logits = torch.tensor([NEVER, 0.0, NEVER, 3.0, NEVER]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, _, entropy = draw_tokens(logits, edges, backend=backend)
    assert token.tolist() == [1, 3] and entropy.isfinite().all()
    assert draw_tokens(logits, edges, top_p=0.5, backend=backend)[0].tolist() == [3, 3]
    # Equal logits: the first of them is the most probable one.
    equal = torch.zeros(2, 21)
    assert draw_tokens(equal, edges, temperature=0.0, backend=backend)[0].tolist() == [0, 0]
    assert draw_tokens(equal, edges, top_p=0.1, backend=backend)[0].tolist() == [0, 2]
    # A forced token that cannot be drawn, and one far below the others.
    token, logprob, _ = draw_tokens(
        torch.tensor([[0.0, NEVER], [200.0, -200.0]]), edges, torch.tensor([1, 1]), backend=backend
    )
    assert token.tolist() == [1, 1] and logprob.tolist() == [NEVER, -400.0]
    # What is no number yields no number, and a token that exists.
    token, logprob, _ = draw_tokens(torch.full((2, 9), float("nan")), edges, backend=backend)
    assert logprob.isnan().all() and (token < 9).all()
    assert draw_tokens(torch.zeros(0, 3), torch.zeros(0, dtype=torch.float64), backend=backend)[0].shape == (0,)


@needs_native
def test_threads_do_not_change_the_bits() -> None:
    logits, point = torch.randn(50, 3000), points(50)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(draw_tokens(logits, point, top_p=0.8, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_served_by_the_next(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 30).to(dtype)
    token, logprob, _ = draw_tokens(logits, points(9))
    assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = draw_tokens(logits.double(), points(9), backend="reference")
    assert torch.equal(token, exact[0])
    torch.testing.assert_close(logprob.double(), exact[1], rtol=1e-5, atol=1e-5)
    if _REASON is None:
        with pytest.raises(dispatch.BackendError, match=f"is compiled for float32, got {dtype}; can: cpu"):
            draw_tokens(logits, points(9), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(3)), r"logits is torch.float32 \[3\]: expected floating point \[N, V\]"),
        (dict(logits=torch.zeros(3, 0)), "V >= 1"),
        (dict(logits=torch.zeros(3, 4, dtype=torch.int64)), "logits is torch.int64"),
        (dict(point=torch.zeros(3)), r"point is torch.float32 \[3\].*expected torch.float64 \[3\]"),
        (dict(point=torch.ones(3, dtype=torch.float64)), r"point=\[1.0, 1.0, 1.0\]: must be in \[0, 1\)"),
        (dict(forced=torch.tensor([0, 1])), r"forced is torch.int64 \[2\].*expected torch.int64 \[3\]"),
        (dict(forced=torch.tensor([0, 4, -1])), r"forced=\[0, 4, -1\]: must be a token below V=4"),
        (dict(temperature=-1.0), "temperature=-1.0: must be positive"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0.0), "top_p=0.0: must be above 0"),
        (dict(backend="cuda"), "backend='cuda' does not exist"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_tokens(**(dict(logits=torch.zeros(3, 4), point=torch.zeros(3, dtype=torch.float64)) | change))


@pytest.mark.parametrize(("device", "default"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9), (0.0, 1.0)])
def test_the_torch_backend_neither_waits_for_a_device_nor_leaves_it(
    temperature: float, top_p: float, device: str, default: str
) -> None:
    """On tensors without values: one that is asked for raises, and so does a tensor made on the default device."""
    inputs = torch.randn(3, 9).bfloat16(), points(3), torch.tensor([-1, 2, -1])
    with FakeTensorMode():
        fake = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs]
        with torch.device(default):
            outs = cpu.Backend.forward(*fake, temperature, top_p)
    assert all(x.device.type == device and x.shape == (3,) for x in outs)
    expected = draw_tokens(*inputs, temperature=temperature, top_p=top_p, backend="torch")
    with torch.device("meta"):
        again = draw_tokens(*inputs, temperature=temperature, top_p=top_p, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_is_a_torch_op() -> None:
    for forced in (None, torch.tensor([-1, 2, 0])):
        torch.library.opcheck(
            torch.ops.r4b_kernels.draw_tokens.default,
            (torch.randn(3, 5), points(3), forced, 0.8, 0.9, "cpu"),
            test_utils=("test_schema", "test_faketensor"),
        )
