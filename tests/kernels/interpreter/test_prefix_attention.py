"""The Triton prefix_attention against dense masked attention in float64, with tiles so small that few tokens take
every path: several tiles a segment, several segments a tile, ragged parents, children apart, empty segments."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r4b_kernels import PrefixLayout, _varlen_schedule, _varlen_triton, dispatch, prefix_attention
from r4b_kernels._varlen_triton import Tile, Tiles
from tests.kernels.head_cases import assert_no_worse
from tests.kernels.test_prefix_attention import LAYOUTS as LARGE
from tests.kernels.test_prefix_attention import dense, layouts, run, tensors

LAYOUTS = {
    "edges": ([0, 1, 15, 16, 17, 0, 33, 0], None),
    "groups": ([37, 9, 20, 0, 5, 33, 18, 2], [-1, 0, 0, -1, 3, -1, 5, 5]),
    "apart": ([20, 6, 17, 8, 19, 4], [-1, -1, 0, 1, 0, 1]),
    "nothing": ([], None),
}
WIDE = Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2))
TALL = Tiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))
LARGER = Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
LARGEST = Tiles(Tile(128, 128, 4, 2), Tile(128, 128, 4, 2), Tile(128, 128, 4, 2))


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(_varlen_triton, "override", getattr(request, "param", WIDE))


def triton(layout: PrefixLayout, inputs: list[Tensor]) -> dict[str, Tensor]:
    return run(layout, inputs, "triton")


def assert_dense(layout: PrefixLayout, inputs: list[Tensor], ours: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference, relative to the largest value (at least 1); exact values past the end."""
    total = int(layout.offsets[-1])
    for key, value in dense(layout, [x.detach().double() for x in inputs]).items():
        if total:
            error = (ours[key][:total].double() - value).abs().max() / value.abs().max().clamp_min(1.0)
            assert error <= tolerance, f"{key}: {error:.1e}"
        assert (ours[key][total:] == (float("-inf") if key == "lse" else 0)).all(), f"{key}: tail"


@pytest.mark.parametrize(
    ("tiles", "name"), [*((WIDE, name) for name in LAYOUTS if name != "apart"), (TALL, "apart")], indirect=["tiles"]
)
def test_float64_is_the_dense_masked_softmax(name: str) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = tensors(int(layout.offsets[-1]) + 5, torch.float64, hq=2, hk=1, dim=24)
    assert_dense(layout, inputs, triton(layout, inputs), 1e-12)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(5, 24), heads=st.sampled_from([(1, 1), (2, 1)]), tail=st.integers(0, 20))
def test_any_layout_is_the_dense_masked_softmax(layout: PrefixLayout, heads: tuple[int, int], tail: int) -> None:
    inputs = tensors(int(layout.offsets[-1]) + tail, torch.float64, *heads)
    assert_dense(layout, inputs, triton(layout, inputs), 1e-12)


@pytest.mark.parametrize("tiles", [LARGEST], ids=["128"], indirect=True)
@pytest.mark.parametrize("name", ["one_prefix_16_responses", "200_tiny"])
def test_many_segments(name: str) -> None:
    layout = PrefixLayout.from_lengths(*LARGE[name])
    inputs = tensors(int(layout.offsets[-1]), torch.float64, hq=1, hk=1)
    assert_dense(layout, inputs, triton(layout, inputs), 1e-12)


@pytest.mark.parametrize("tiles", [LARGER], ids=["64"], indirect=True)
@pytest.mark.parametrize("dim", [72, 96, 256])
def test_head_dims_in_float32(dim: int) -> None:
    layout = PrefixLayout.from_lengths([70, 5, 14, 40], [-1, 0, 0, -1])
    inputs = tensors(129, torch.float32, hq=2, hk=1, dim=dim)
    ours = triton(layout, inputs)
    assert ours["lse"].dtype == torch.float32
    assert_dense(layout, inputs, ours, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    layout = PrefixLayout.from_lengths([37, 9, 20, 5], [-1, 0, 0, -1])
    inputs = tensors(71, dtype, hq=2, hk=1, dim=32)
    truth, rival = (dense(layout, [x.detach().to(t) for x in inputs]) for t in (torch.float64, dtype))
    ours = triton(layout, inputs)
    assert all(ours[key].dtype == dtype for key in ours if key != "lse")
    assert_no_worse(ours, rival, {key: value for key, value in truth.items() if key != "lse"})


def test_gradcheck() -> None:
    layout = PrefixLayout.from_lengths([19, 0, 3, 14], [-1, -1, 0, 0])
    *qkv, _ = tensors(38, torch.float64, 2, 1, dim=3)
    assert torch.autograd.gradcheck(
        lambda *x: prefix_attention(*x, layout, scale=0.7, backend="triton"), qkv, fast_mode=True
    )


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_that_are_not_positive(scale: float) -> None:
    layout = PrefixLayout.from_lengths([33, 20], [-1, 0])
    *qkv, grad = tensors(53, torch.float64, 2, 1)
    ours, truth = (prefix_attention(*qkv, layout, scale=scale, backend=b) for b in ("triton", "reference"))
    pairs = ((x, *torch.autograd.grad(x, qkv, grad)) for x in (ours, truth))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_the_order_of_programs_changes_no_bit(same_in_any_order) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS["apart"])
    inputs = tensors(74, torch.float32, hq=2, hk=1)
    same_in_any_order(lambda: triton(PrefixLayout(layout.offsets.clone(), layout.parent), inputs))


@pytest.mark.parametrize("tiles", [LARGER], ids=["64"], indirect=True)
def test_a_shared_prompt_is_its_copies() -> None:
    """Values and gradients with one prompt equal those of a prompt per response, summed over the copies."""
    prompt, responses = 67, [1, 30, 64, 5]
    layout = PrefixLayout.from_lengths([prompt, *responses], [-1, *[0] * len(responses)])
    inputs = tensors(prompt + sum(responses), torch.float64, hq=2, hk=1)
    shared = triton(layout, inputs)
    copies = []
    for x in inputs:
        head, *tails = x.detach().split([prompt, *responses])
        # The prompt's own loss is shared out evenly among its copies.
        head = head / len(responses) if x is inputs[3] else head
        copies.append(torch.cat([part for tail in tails for part in (head, tail)]).requires_grad_())
    lengths = [prompt + length for length in responses]
    flat = triton(PrefixLayout.from_lengths(lengths), copies)
    for key in ("out", "grad_q", "grad_k", "grad_v"):
        pieces = flat[key].split(lengths)
        heads = torch.stack([piece[:prompt] for piece in pieces])
        joined = torch.cat([heads[0] if key == "out" else heads.sum(0), *(piece[prompt:] for piece in pieces)])
        torch.testing.assert_close(shared[key], joined, rtol=0, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("lengths", "parents", "dirty"),
    [
        ([20, 9, 17, 6], [-1, 0, -1, 2], [(0, 29), (52, 57)]),  # a group, and the padding
        ([6, 9, 20, 17], None, [(6, 15)]),  # one of several segments in a tile
        ([20, 6, 17, 8, 19, 4], [-1, -1, 0, 1, 0, 1], [(20, 26), (43, 51), (70, 74)]),  # between a prompt's answers
    ],
    ids=["groups", "straddling", "apart"],
)
def test_nan_stays_in_its_group(lengths: list[int], parents: list[int] | None, dirty: list[tuple[int, int]]) -> None:
    layout = PrefixLayout.from_lengths(lengths, parents)
    total = int(layout.offsets[-1])
    inputs = tensors(total + 5, torch.float32, hq=2, hk=1)
    clean = triton(layout, inputs)
    rest = torch.ones(total + 5, dtype=torch.bool)
    soiled = [x.detach().clone() for x in inputs]
    for start, stop in dirty:
        rest[start:stop] = False
        for x in soiled:
            x[start:stop] = float("nan")
    soiled = triton(layout, [x.requires_grad_() for x in soiled])
    for key, value in clean.items():
        assert torch.equal(value[rest], soiled[key][rest]), key
        assert soiled[key][:total][~rest[:total]].isnan().all(), f"{key}: NaN went unseen"


@pytest.mark.parametrize(
    ("offsets", "parent"),
    [
        ([0, 9, 4, 12], [-1, -1, -1]),
        ([3, 9, 10, 12], [-1, -1, -1]),
        ([0, 9, 10, 2**31 - 1], [-1, -1, -1]),
        ([-(2**31), 9, 10, 12], [-1, -1, -1]),
        ([0, 9, 10, 12], [-1, 2**31 - 1, -1]),
        ([0, 9, 10, 12], [-1, 0, 1]),
        ([0, 9, 10, 12], [-1, -7, 0]),
        ([5], []),
    ],
    ids=str,
)
def test_a_malformed_layout_gives_nan_and_touches_nothing_else(offsets: list[int], parent: list[int]) -> None:
    """The interpreter raises at any access outside of a tensor."""
    q = torch.ones(40, 1, 16)
    cut = torch.tensor(offsets, dtype=torch.int32), torch.tensor(parent, dtype=torch.int32)
    out, lse = torch.ops.r4b_kernels.prefix_attention(q, q, q, *cut, 1.0, "triton")
    grads = torch.ops.r4b_kernels.prefix_attention_backward(q, q, q, q, out, lse, *cut, 1.0, "triton")
    assert all(x.isnan().all() for x in (out, lse, *grads))


def test_layers_share_a_schedule_that_cannot_go_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = _varlen_schedule.Schedule.__init__
    monkeypatch.setattr(_varlen_schedule.Schedule, "__init__", lambda self, *a: (made.append(1), make(self, *a))[1])
    layout = PrefixLayout.from_lengths([9, 8, 3], [-1, 0, 0])
    inputs = tensors(20, torch.float64, hq=1, hk=1)
    for _ in range(2):
        assert_dense(layout, inputs, triton(layout, inputs), 1e-12)
    assert len(made) == 1
    layout.offsets[1] = 5
    assert_dense(layout, inputs, triton(layout, inputs), 1e-12)
    assert len(made) == 2
    schedule = weakref.ref(_varlen_schedule.schedule_for(layout.offsets, layout.parent, 20, True))
    assert len(made) == 2 and schedule() is not None
    del layout
    gc.collect()
    assert schedule() is None


def test_compiles_into_one_graph() -> None:
    layout = PrefixLayout.from_lengths([9, 8, 3], [-1, 0, 0])
    *qkv, grad = tensors(20, torch.float32, hq=1, hk=1)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q * 2, k, v, layout, backend="triton").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = (torch.autograd.grad(function(*qkv), qkv, grad) for function in (compiled, step))
    for mine, truth in zip(*grads, strict=True):
        assert torch.equal(mine, truth)


def test_strided_inputs_and_gradient() -> None:
    layout = PrefixLayout.from_lengths([9, 5, 20], [-1, 0, -1])
    fused = torch.randn(36, 4, 16, dtype=torch.float64).requires_grad_()
    transposed = torch.randn(4, 36, 16, dtype=torch.float64).requires_grad_()
    for x in (fused, transposed.transpose(0, 1)):
        grads = []
        for backend in ("triton", "reference"):
            out = prefix_attention(x[:, :2], x[:, 2:3], x[:, 3:], layout, backend=backend)
            grads.append(torch.autograd.grad(out.sum(), x)[0])
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_what_it_cannot_serve_it_refuses() -> None:
    layout = PrefixLayout.from_lengths([4])
    *qkv, _ = tensors(4, torch.float32, 1, 1, dim=264)
    with pytest.raises(dispatch.BackendError, match="D=264"):
        prefix_attention(*qkv, layout, backend="triton")
