"""The Triton vision_attention against block-diagonal attention in float64, with tiles of few patches."""

from __future__ import annotations

import pytest
import torch

from r4b_kernels import _varlen_triton, vision_attention
from r4b_kernels._varlen_triton import Tile, Tiles
from tests.kernels.head_cases import assert_no_worse
from tests.kernels.test_vision_attention import NAMES, cu_seqlens, dense, run, tensors

IMAGES = {
    "edges": [0, 1, 15, 16, 17, 0, 33, 0],
    "many_tiny": [1 + i * 7 % 6 for i in range(30)],
    "few_large": [70, 3, 40],
    "nothing": [],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_varlen_triton, "override", Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)))


@pytest.mark.parametrize("name", IMAGES)
def test_float64_is_the_dense_masked_softmax(name: str) -> None:
    lengths = IMAGES[name]
    inputs = tensors(sum(lengths) + 5, torch.float64, heads=1, dim=24)
    ours, truth = run(lengths, inputs, "triton"), dense(lengths, inputs)
    for key, value in truth.items():
        torch.testing.assert_close(ours[key][: sum(lengths)], value, rtol=0, atol=1e-12, msg=key)
        assert (ours[key][sum(lengths) :] == 0).all(), f"{key}: padding"


@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_head_dims_in_float32(dim: int) -> None:
    lengths = [37, 5, 14]
    inputs = tensors(sum(lengths), torch.float32, heads=1, dim=dim)
    truth = dense(lengths, [x.detach().double() for x in inputs])
    for key, value in run(lengths, inputs, "triton").items():
        assert (value - truth[key]).abs().max() <= 2e-6 * truth[key].abs().max().clamp_min(1.0), key


def test_bfloat16_is_no_worse_than_torch() -> None:
    lengths = [37, 5, 14]
    inputs = tensors(sum(lengths), torch.bfloat16, heads=1, dim=72)
    truth = dense(lengths, [x.detach().double() for x in inputs])
    ours = run(lengths, inputs, "triton")
    assert all(ours[key].dtype == torch.bfloat16 for key in NAMES)
    assert_no_worse(ours, dense(lengths, inputs), truth)


def test_gradcheck() -> None:
    *qkv, _ = tensors(26, torch.float64, heads=1, dim=3)
    boundaries = cu_seqlens([5, 0, 18, 1])
    assert torch.autograd.gradcheck(
        lambda *x: vision_attention(*x, boundaries, scale=0.7, backend="triton"), qkv, fast_mode=True
    )


def test_the_order_of_programs_changes_no_bit(same_in_any_order) -> None:
    inputs = tensors(60, torch.float32, heads=2)
    same_in_any_order(lambda: run([9, 21, 30], inputs, "triton"))


def test_nan_stays_in_its_image() -> None:
    """Three images in a tile, and the padding after them."""
    inputs = tensors(33, torch.float32, heads=1)
    clean = run([10, 9, 11], inputs, "triton")
    soiled = [x.detach().clone() for x in inputs]
    for x in soiled:
        x[10:19] = float("nan")
        x[30:] = float("nan")
    soiled = run([10, 9, 11], [x.requires_grad_() for x in soiled], "triton")
    for key, value in clean.items():
        for other in (slice(0, 10), slice(19, 33)):
            assert torch.equal(value[other], soiled[key][other]), key
        assert soiled[key][10:19].isnan().all(), f"{key}: NaN went unseen"


@pytest.mark.parametrize("boundaries", [[0, 9, 4], [2, 9, 12], [0, 9, 41], [-5, 9, 12], [3]], ids=str)
def test_malformed_boundaries_give_nan(boundaries: list[int]) -> None:
    q = torch.ones(40, 1, 16)
    cut = torch.tensor(boundaries, dtype=torch.int32)
    out, lse = torch.ops.r4b_kernels.vision_attention(q, q, q, cut, 1.0, "triton")
    grads = torch.ops.r4b_kernels.vision_attention_backward(q, q, q, q, out, lse, cut, 1.0, "triton")
    assert all(x.isnan().all() for x in (out, lse, *grads))
