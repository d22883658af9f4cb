from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import r4b_kernels
from r4b_kernels import BackendError, PrefixLayout, prefix_attention
from r4b_kernels.prefix_attention import reference

EDGES = [0, 1, 63, 64, 65, 127, 129]
LAYOUTS = {
    "edges": (EDGES, None),
    "edges_of_children": ([37, *EDGES], [-1, *[0] * len(EDGES)]),
    "one_prefix_16_responses": ([70, *range(3, 51, 3)], [-1, *[0] * 16]),
    "200_tiny": ([1 + i * 7 % 6 for i in range(200)], [-1 if i % 5 == 0 else i - i % 5 for i in range(200)]),
    "empty_parent": ([4, 0, 5, 0, 3], [-1, -1, 1, -1, 0]),
    "children_apart": ([5, 6, 7, 8, 9, 4], [-1, -1, 0, 1, 0, 1]),
    "long": ([530, 600, 9], [-1, 0, 0]),
    "nothing": ([], None),
}


def tensors(num_tokens: int, dtype: torch.dtype, hq: int = 4, hk: int = 2, dim: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (hq, hk, hk, hq)
    ]


def run(layout: PrefixLayout, inputs: list[Tensor], backend: str | None = None) -> dict[str, Tensor]:
    *qkv, grad = inputs
    out, lse = prefix_attention(*qkv, layout, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, qkv, grad.detach())
    return dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out, lse, *grads), strict=True))


def dense(layout: PrefixLayout, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Independent of the package: torch's attention under the [T, T] mask; the tail is cut off before."""
    total = int(layout.offsets[-1])
    *qkv, grad = [x.detach()[:total].requires_grad_() for x in inputs]
    mask = layout.dense_mask(total)
    q, k, v = (x[None].transpose(1, 2) for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    grads = torch.autograd.grad(out, qkv, grad)
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)[0].T
    return dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out, lse, *grads), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "nothing"])
def test_backends_are_the_dense_masked_softmax(name: str, backend: str) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS[name])
    total = int(layout.offsets[-1])
    inputs = tensors(total + 11, torch.float64)
    mine, truth = run(layout, inputs, backend), dense(layout, inputs)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key][:total], value, rtol=0, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        assert (mine[key][total:] == (float("-inf") if key == "lse" else 0)).all(), f"{key}: tail"


@st.composite
def layouts(draw: st.DrawFn, segments: int, length: int) -> PrefixLayout:
    """Any lengths, any parents: children may be apart, among other segments, or of an empty parent."""
    lengths = draw(st.lists(st.integers(0, length), max_size=segments))
    parents: list[int] = []
    for _ in lengths:
        parents.append(draw(st.sampled_from([-1, *(i for i, parent in enumerate(parents) if parent == -1)])))
    return PrefixLayout.from_lengths(lengths, parents)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layout=layouts(9, 20), heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]), tail=st.integers(0, 4))
def test_any_layout_is_the_dense_masked_softmax(layout: PrefixLayout, heads: tuple[int, int], tail: int) -> None:
    total = int(layout.offsets[-1])
    inputs = tensors(total + tail, torch.float64, *heads)
    mine, truth = run(layout, inputs, "cpu"), dense(layout, inputs)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key][:total], value, rtol=0, atol=1e-12)
        assert (mine[key][total:] == (float("-inf") if key == "lse" else 0)).all(), f"{key}: tail"


@pytest.mark.parametrize("name", LAYOUTS)
def test_cpu_is_the_reference_in_float32(name: str) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = tensors(int(layout.offsets[-1]) + 3, torch.float32, dim=32)
    truth = run(layout, [x.detach().double().requires_grad_() for x in inputs], "reference")
    for key, value in run(layout, inputs, "cpu").items():
        seen = truth[key].isfinite()
        scale = truth[key][seen].abs().max().clamp_min(1.0) if seen.any() else 1.0
        assert value.dtype == torch.float32
        assert ((value.double() - truth[key])[seen].abs() <= 2e-6 * scale).all(), key
        assert (value[~seen] == float("-inf")).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["one_prefix_16_responses", "edges_of_children", "200_tiny"])
def test_bfloat16_is_no_worse_than_torch(name: str, backend: str) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = tensors(int(layout.offsets[-1]), torch.bfloat16, dim=32)
    truth = dense(layout, [x.detach().double() for x in inputs])
    rival, mine = dense(layout, inputs), run(layout, inputs, backend)
    for key in ("out", "grad_q", "grad_k", "grad_v"):
        assert mine[key].dtype == torch.bfloat16
        errors = [(result[key].double() - truth[key]).norm() for result in (mine, rival)]
        assert errors[0] <= 1.5 * errors[1], key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 2)])
def test_gradcheck(heads: tuple[int, int], backend: str) -> None:
    layout = PrefixLayout.from_lengths([5, 0, 3, 1, 4, 2], [-1, -1, 0, 0, 1, 0])
    *qkv, _ = tensors(17, torch.float64, *heads, dim=3)
    assert torch.autograd.gradcheck(
        lambda *x: prefix_attention(*x, layout, scale=0.7, backend=backend), qkv, fast_mode=True
    )


@pytest.mark.parametrize("dim", [72, 80, 96, 128, 256])
def test_head_dims(dim: int) -> None:
    layout = PrefixLayout.from_lengths([9, 5, 14], [-1, 0, -1])
    inputs = tensors(28, torch.float64, dim=dim)
    mine, truth = run(layout, inputs, "cpu"), dense(layout, inputs)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12)


def test_a_shared_prompt_is_its_copies() -> None:
    """Loss and every gradient with one prompt equal those of a prompt per response, summed over the copies."""
    prompt, responses = 23, [1, 7, 30, 64, 12, 5]
    layout = PrefixLayout.from_lengths([prompt, *responses], [-1, *[0] * len(responses)])
    inputs = tensors(prompt + sum(responses), torch.float64)
    shared = run(layout, inputs)

    copies = []
    for x in inputs:
        head, *tails = x.detach().split([prompt, *responses])
        # The prompt's own loss is shared out evenly among its copies.
        head = head / len(responses) if x is inputs[3] else head
        copies.append(torch.cat([part for tail in tails for part in (head, tail)]).requires_grad_())
    flat = run(PrefixLayout.from_lengths([prompt + length for length in responses]), copies)

    pieces = {key: value.split([prompt + length for length in responses]) for key, value in flat.items()}
    loss = sum((out * grad).sum() for out, grad in zip(flat["out"], copies[3], strict=True))
    torch.testing.assert_close((shared["out"] * inputs[3]).sum(), loss, rtol=0, atol=1e-11)
    for key in ("out", "grad_q", "grad_k", "grad_v"):
        heads = torch.stack([piece[:prompt] for piece in pieces[key]])
        joined = torch.cat([heads[0] if key == "out" else heads.sum(0), *(piece[prompt:] for piece in pieces[key])])
        torch.testing.assert_close(shared[key], joined, rtol=0, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_bit_repeatable_on_several_threads() -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS["one_prefix_16_responses"])
    inputs = tensors(int(layout.offsets[-1]), torch.float32, dim=32)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = run(layout, inputs), run(layout, inputs)
    finally:
        torch.set_num_threads(before)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_segment_is_deaf_to_its_neighbours() -> None:
    """NaN in one group and in the tail reaches no other group, forward or backward."""
    layout = PrefixLayout.from_lengths([6, 4, 9, 5], [-1, 0, -1, 2])
    inputs = tensors(26, torch.float32)
    clean = run(layout, inputs)
    dirty = [x.detach().clone() for x in inputs]
    for x in dirty:
        x[:10] = float("nan")
        x[24:] = float("nan")
    soiled = run(layout, [x.requires_grad_() for x in dirty])
    for key, value in clean.items():
        assert torch.equal(value[10:], soiled[key][10:]), key


def test_strided_inputs_and_heads_of_a_fused_projection() -> None:
    layout = PrefixLayout.from_lengths([9, 5, 600], [-1, 0, -1])
    fused = torch.randn(620, 8, 16, dtype=torch.float64)
    views = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    torch.testing.assert_close(
        prefix_attention(*views, layout), prefix_attention(*(x.contiguous() for x in views), layout), rtol=0, atol=0
    )


@pytest.mark.parametrize("lengths", [[9, 5, 14], [530, 600, 9]])
def test_any_strides_of_inputs_and_gradient(lengths: list[int]) -> None:
    layout = PrefixLayout.from_lengths(lengths, [-1, 0, 0])
    *qkv, _ = tensors(sum(lengths), torch.float64)

    def strided(x: Tensor) -> Tensor:
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    grads = []
    for backend in ("cpu", "reference"):
        out = prefix_attention(*(strided(x) for x in qkv), layout, backend=backend)
        # The gradient that arrives is an expanded scalar here, and strided there.
        grads.append(torch.autograd.grad(out[:, 0].sum() + (strided(out) * 3).sum(), qkv, retain_graph=True))
        grads[-1] += torch.autograd.grad(out.sum(), qkv)
    for mine, truth in zip(*grads, strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-11)


def test_lse_carries_no_gradient() -> None:
    layout = PrefixLayout.from_lengths([4])
    *qkv, _ = tensors(4, torch.float32)
    out, lse = prefix_attention(*qkv, layout, return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    assert prefix_attention(*(x.double() for x in qkv), layout, return_lse=True)[1].dtype == torch.float64


def test_opcheck() -> None:
    layout = PrefixLayout.from_lengths([5, 3, 4], [-1, 0, 0])
    *qkv, grad = tensors(14, torch.float32)
    settings = (layout.offsets, layout.parent, 0.3, None)
    torch.library.opcheck(torch.ops.r4b_kernels.prefix_attention.default, (*qkv, *settings))
    q, k, v = (x.detach() for x in qkv)
    out, lse = torch.ops.r4b_kernels.prefix_attention(q, k, v, *settings)
    torch.library.opcheck(
        torch.ops.r4b_kernels.prefix_attention_backward.default, (grad.detach(), q, k, v, out, lse, *settings)
    )


def test_compile_fullgraph() -> None:
    layout = PrefixLayout.from_lengths([5, 3, 4], [-1, 0, 0])
    *qkv, grad = tensors(14, torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q * 2, k, v, layout).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        torch.autograd.grad(compiled(*qkv), qkv, grad), torch.autograd.grad(step(*qkv), qkv, grad), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


def test_an_unknown_backend_names_what_exists() -> None:
    layout = PrefixLayout.from_lengths([4])
    *qkv, _ = tensors(4, torch.float32)
    with pytest.raises(BackendError, match="triton.*cpu.*reference"):
        prefix_attention(*qkv, layout, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4)}, "q has shape"),
        ({"q": torch.zeros(8, 3, 8)}, "heads of q"),
        ({"k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 8)}, "k has 7 tokens"),
        ({"v": torch.zeros(8, 1, 8)}, "k has shape"),
        ({"k": torch.zeros(8, 2, 4), "v": torch.zeros(8, 2, 4)}, "D=4"),
        ({"v": torch.zeros(8, 2, 8).double()}, "v is torch.float64"),
        ({"q": torch.zeros(8, 4, 8, device="meta")}, "k is .* on cpu"),
        ({name: torch.zeros(8, 2, 8, dtype=torch.int32) for name in "qkv"}, "floating"),
        ({"layout": PrefixLayout.from_lengths([9])}, "covers 9 tokens but q has 8"),
        ({"layout": PrefixLayout.from_lengths([8], device="meta")}, r"layout.to\(q.device\)"),
    ],
)
def test_user_errors(change: dict, message: str) -> None:
    good = {"q": torch.zeros(8, 4, 8), "k": torch.zeros(8, 2, 8), "v": torch.zeros(8, 2, 8)}
    arguments = {**good, "layout": PrefixLayout.from_lengths([8]), **change}
    with pytest.raises(ValueError, match=message):
        prefix_attention(**arguments)


INT32 = torch.int32
MALFORMED = [
    ([0, 5, 3], [-1, -1], r"offsets\[2\] = 3 after 5: .* never decrease", "never decrease"),
    ([1, 5, 8], [-1, -1], r"offsets\[0\] = 1: .* start at 0", "start at 0"),
    ([0, 5, 8], [-1, 1], r"parent\[1\] = 1: a parent must be an earlier", r"layout.parent\[1\] = 1"),
    ([0, 2, 5, 8], [-1, 0, 1], r"parent\[2\] = 1: .* no parent itself", r"layout.parent\[2\] = 1"),
    ([0, 5, 8], [-1, -2], r"parent\[1\] = -2", r"layout.parent\[1\] = -2"),
]


@pytest.mark.parametrize(("offsets", "parent", "message", "_"), MALFORMED)
def test_a_malformed_layout_is_refused_when_it_is_made(offsets: list, parent: list, message: str, _: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLayout(torch.tensor(offsets, dtype=INT32), torch.tensor(parent, dtype=INT32))


@pytest.mark.parametrize(("offsets", "parent", "_", "message"), MALFORMED)
def test_the_bare_op_refuses_it_too(offsets: list, parent: list, _: str, message: str) -> None:
    q = torch.zeros(8, 1, 8)
    with pytest.raises(ValueError, match=message):
        torch.ops.r4b_kernels.prefix_attention(
            q, q, q, torch.tensor(offsets, dtype=INT32), torch.tensor(parent, dtype=INT32), 1.0, "cpu"
        )


@pytest.mark.parametrize(
    ("offsets", "parent", "message"),
    [
        (torch.tensor([0, 8]), torch.tensor([-1]), "offsets is torch.int64 .*int32"),
        (torch.zeros(1, dtype=INT32), torch.tensor([-1], dtype=INT32), "offsets has 1 entries for 1 of parent"),
        (torch.zeros(2, 1, dtype=INT32), torch.tensor([-1], dtype=INT32), "one dimension"),
    ],
)
def test_a_layout_of_the_wrong_form_is_refused(offsets: Tensor, parent: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLayout(offsets, parent)


def test_values_on_a_device_are_looked_at_on_demand_alone() -> None:
    """Making a layout, or moving one, waits for no device; ``check`` does."""
    elsewhere = PrefixLayout.from_lengths([3, 4], [-1, 0]).to("meta")
    assert PrefixLayout(elsewhere.offsets, elsewhere.parent).num_segments == 2
    with pytest.raises((NotImplementedError, RuntimeError)):
        elsewhere.check()
    layout = PrefixLayout.from_lengths([3, 4], [-1, 0])
    layout.offsets[1] = 9
    with pytest.raises(ValueError, match="never decrease"):
        layout.check()


def test_reference_is_differentiable_by_autograd() -> None:
    layout = PrefixLayout.from_lengths([3, 4], [-1, 0])
    *qkv, grad = tensors(8, torch.float64)
    out, _ = reference.prefix_attention(*qkv, layout.offsets, layout.parent, 8**-0.5)
    for mine, key in zip(torch.autograd.grad(out, qkv, grad), ("grad_q", "grad_k", "grad_v"), strict=True):
        torch.testing.assert_close(mine, run(layout, [*qkv, grad])[key], rtol=0, atol=1e-12)


def test_package_exports_the_function() -> None:
    assert r4b_kernels.prefix_attention is prefix_attention
    assert set(r4b_kernels.__all__) <= set(dir(r4b_kernels))
