from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import BackendError, vision_attention

IMAGES = {
    "edges": [0, 1, 63, 64, 65, 127, 129],
    "200_tiny": [1 + i * 7 % 6 for i in range(200)],
    "equal": [16] * 12,
    "large": [520, 4, 700],
    "nothing": [],
}
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def tensors(num_patches: int, dtype: torch.dtype, heads: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_patches, heads, dim)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in range(4)]


def run(lengths: list[int], inputs: list[Tensor], backend: str | None = None) -> dict[str, Tensor]:
    *qkv, grad = inputs
    out = vision_attention(*qkv, cu_seqlens(lengths), backend=backend)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, qkv, grad.detach())), strict=True))


def dense(lengths: list[int], inputs: list[Tensor]) -> dict[str, Tensor]:
    total = sum(lengths)
    *qkv, grad = [x.detach()[:total].requires_grad_() for x in inputs]
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    q, k, v = (x[None].transpose(1, 2) for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, qkv, grad)), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [name for name in IMAGES if name != "nothing"])
def test_backends_are_the_dense_masked_softmax(name: str, backend: str) -> None:
    lengths = IMAGES[name]
    inputs = tensors(sum(lengths) + 5, torch.float64)
    mine, truth = run(lengths, inputs, backend), dense(lengths, inputs)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key][: sum(lengths)], value, rtol=0, atol=1e-12)
        assert (mine[key][sum(lengths) :] == 0).all(), f"{key}: tail"


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dim", [16, 72])
def test_cpu_is_the_reference_in_float32(name: str, dim: int) -> None:
    inputs = tensors(sum(IMAGES[name]) + 5, torch.float32, dim=dim)
    truth = run(IMAGES[name], [x.detach().double().requires_grad_() for x in inputs], "reference")
    for key, value in run(IMAGES[name], inputs, "cpu").items():
        assert value.dtype == torch.float32
        assert (value - truth[key]).abs().max() <= 2e-6 * truth[key].abs().max().clamp_min(1.0), key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["edges", "200_tiny"])
def test_bfloat16_is_no_worse_than_torch(name: str, backend: str) -> None:
    inputs = tensors(sum(IMAGES[name]), torch.bfloat16, dim=72)
    truth = dense(IMAGES[name], [x.detach().double() for x in inputs])
    rival, mine = dense(IMAGES[name], inputs), run(IMAGES[name], inputs, backend)
    for key in NAMES:
        assert mine[key].dtype == torch.bfloat16
        errors = [(result[key].double() - truth[key]).norm() for result in (mine, rival)]
        assert errors[0] <= 1.5 * errors[1], key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str) -> None:
    *qkv, _ = tensors(14, torch.float64, dim=3)
    boundaries = cu_seqlens([5, 0, 3, 1, 4])
    assert torch.autograd.gradcheck(
        lambda *x: vision_attention(*x, boundaries, scale=0.7, backend=backend), qkv, fast_mode=True
    )


def test_bit_repeatable_on_several_threads() -> None:
    inputs = tensors(449, torch.float32, dim=72)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = run(IMAGES["edges"], inputs), run(IMAGES["edges"], inputs)
    finally:
        torch.set_num_threads(before)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_an_image_is_deaf_to_its_neighbours() -> None:
    """The images share a padded call, and still NaN in one, or in the tail, reaches no other."""
    inputs = tensors(32, torch.float32)
    clean = run([10, 9, 11], inputs)
    dirty = [x.detach().clone() for x in inputs]
    for x in dirty:
        x[10:19] = float("nan")
        x[30:] = float("nan")
    soiled = run([10, 9, 11], [x.requires_grad_() for x in dirty])
    for key, value in clean.items():
        for other in (slice(0, 10), slice(19, 32)):
            assert torch.equal(value[other], soiled[key][other]), key


@pytest.mark.parametrize("lengths", [[9, 5, 14], [600, 9]])
def test_any_strides(lengths: list[int]) -> None:
    inputs = tensors(sum(lengths), torch.float64)
    strided = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in inputs]
    mine, truth = run(lengths, strided), run(lengths, inputs, "reference")
    for key, value in truth.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12, msg=key)


def test_opcheck() -> None:
    *qkv, grad = tensors(14, torch.float32)
    settings = (cu_seqlens([5, 3, 4]), 0.3, None)
    torch.library.opcheck(torch.ops.r4b_kernels.vision_attention.default, (*qkv, *settings))
    q, k, v = (x.detach() for x in qkv)
    out, lse = torch.ops.r4b_kernels.vision_attention(q, k, v, *settings)
    torch.library.opcheck(
        torch.ops.r4b_kernels.vision_attention_backward.default, (grad.detach(), q, k, v, out, lse, *settings)
    )


def test_compile_fullgraph() -> None:
    *qkv, grad = tensors(14, torch.float32)
    boundaries = cu_seqlens([5, 3, 4])

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vision_attention(q * 2, k, v, boundaries).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        torch.autograd.grad(compiled(*qkv), qkv, grad), torch.autograd.grad(step(*qkv), qkv, grad), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4)}, "q has shape"),
        ({"k": torch.zeros(8, 1, 8)}, "k has shape"),
        ({"v": torch.zeros(8, 2, 8).double()}, "v is torch.float64"),
        ({name: torch.zeros(8, 2, 8).int() for name in "qkv"}, "floating"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens is torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 9]).int()}, "covers 9 patches but q has 8"),
        ({"cu_seqlens": torch.tensor([0, 5, 4]).int()}, "never decrease"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens is on meta"),
        ({"backend": "triton"}, "triton.*cpu.*reference"),
    ],
)
def test_user_errors(change: dict, message: str) -> None:
    good = {name: torch.zeros(8, 2, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message) as caught:
        vision_attention(**{**good, "cu_seqlens": cu_seqlens([8]), **change})
    assert isinstance(caught.value, BackendError) == ("backend" in change)
