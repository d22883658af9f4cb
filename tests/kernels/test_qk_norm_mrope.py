from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from r4b_kernels import BackendError, qk_norm_mrope
from r4b_kernels.qk_norm_mrope import pair_axes, reference

NAMES = ("q", "k", "grad_q", "grad_k", "grad_q_weight", "grad_k_weight")
KINDS = {
    "plain": {"sections": None},
    "chunked": {"sections": [4, 6, 6]},
    "interleaved": {"sections": [6, 5, 5], "interleaved": True},
    "no_width": {"sections": [10, 6, 0], "interleaved": True},
}


def tensors(tokens: int, dtype: torch.dtype, dim: int = 32, hq: int = 4, hk: int = 2) -> list[Tensor]:
    """q, k, q_weight, k_weight, grad_q, grad_k"""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, hq, dim), (tokens, hk, dim), (dim,), (dim,), (tokens, hq, dim), (tokens, hk, dim)]
    values = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in values]


def positions(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, 3000, (3, tokens), generator=torch.Generator().manual_seed(1)).to(dtype)


def run(inputs: list[Tensor], position_ids: Tensor, backend: str | None = None, **settings) -> dict[str, Tensor]:
    leaves, grads = inputs[:4], [x.detach() for x in inputs[4:]]
    outputs = qk_norm_mrope(*leaves, position_ids, theta=1e4, backend=backend, **settings)
    return dict(zip(NAMES, (*outputs, *torch.autograd.grad(outputs, leaves, grads)), strict=True))


def transformers_qwen3(
    inputs: list[Tensor], position_ids: Tensor, sections: list[int] | None, interleaved: bool = True
) -> dict[str, Tensor]:
    """transformers' Qwen3 norm and rotation; cos and sin from its embedding for Qwen3-VL (interleaved) or Qwen2-VL."""
    q, k, q_weight, k_weight, grad_q, grad_k = inputs
    dim = q.shape[-1]
    half = dim // 2
    config = (Qwen3VLTextConfig if interleaved else Qwen2VLTextConfig)(
        hidden_size=4 * dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections or [half, 0, 0]},
    )
    config.head_dim = dim
    embedding = (Qwen3VLTextRotaryEmbedding if interleaved else Qwen2VLRotaryEmbedding)(config)
    cos, sin = embedding(q, position_ids[:, None])
    normed = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        norm = Qwen3RMSNorm(dim, eps=1e-6)
        norm.weight = torch.nn.Parameter(weight.detach().clone())
        normed.append((norm, norm(x)[None].transpose(1, 2)))
    outputs = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(normed[0][1], normed[1][1], cos, sin)]
    leaves = (q, k, normed[0][0].weight, normed[1][0].weight)
    return dict(zip(NAMES, (*outputs, *torch.autograd.grad(outputs, leaves, (grad_q, grad_k))), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["qwen3_vl", "qwen2_vl"])
@pytest.mark.parametrize("sections", [None, [6, 5, 5], [8, 8, 0]], ids=str)
def test_is_transformers(sections: list[int] | None, interleaved: bool, backend: str) -> None:
    inputs, position_ids = tensors(65, torch.float32), positions(65)
    truth = transformers_qwen3(inputs, position_ids, sections, interleaved)
    mine = run(inputs, position_ids, backend, sections=sections, interleaved=interleaved)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=2e-6 * value.abs().max().item(), msg=key)


def test_pair_axes() -> None:
    assert pair_axes(16, None, True) == []
    assert pair_axes(16, [2, 3, 3], False) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert pair_axes(16, [4, 2, 2], True) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert pair_axes(128, [24, 20, 20], True).count(0) == 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 127, 129])
def test_cpu_is_the_reference(kind: str, tokens: int) -> None:
    inputs = tensors(tokens, torch.float64)
    position_ids = positions(tokens, torch.int32)
    truth = run(inputs, position_ids, "reference", **KINDS[kind])
    for key, value in run(inputs, position_ids, "cpu", **KINDS[kind]).items():
        torch.testing.assert_close(value, truth[key], rtol=0, atol=1e-12, msg=key)
    narrow = [x.detach().float().requires_grad_() for x in inputs]
    truth = run(narrow, position_ids, "reference", **KINDS[kind])
    for key, value in run(narrow, position_ids, "cpu", **KINDS[kind]).items():
        assert value.dtype == torch.float32
        if value.numel():
            assert (value - truth[key]).abs().max() <= 2e-6 * truth[key].abs().max().clamp_min(1.0), key


def test_blocks_of_tokens_join_seamlessly() -> None:
    inputs, position_ids = tensors(3001, torch.float64), positions(3001)
    truth = run(inputs, position_ids, "reference", **KINDS["interleaved"])
    for key, value in run(inputs, position_ids, "cpu", **KINDS["interleaved"]).items():
        torch.testing.assert_close(value, truth[key], rtol=0, atol=2e-12, msg=key)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bfloat16_is_no_worse_than_torch(backend: str) -> None:
    inputs, position_ids = tensors(200, torch.bfloat16), positions(200) % 8
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(wide, position_ids, "reference", **KINDS["interleaved"])
    rival = transformers_qwen3(inputs, position_ids, [6, 5, 5])
    for key, value in run(inputs, position_ids, backend, **KINDS["interleaved"]).items():
        assert value.dtype == torch.bfloat16
        errors = [(result.double() - truth[key]).norm() for result in (value, rival[key])]
        assert errors[0] <= 1.5 * errors[1], key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, backend: str) -> None:
    leaves = tensors(5, torch.float64)[:4]
    position_ids = positions(5) % 50
    assert torch.autograd.gradcheck(
        lambda *x: qk_norm_mrope(*x, position_ids, theta=1e4, backend=backend, **KINDS[kind]), leaves, fast_mode=True
    )


def test_bit_repeatable() -> None:
    inputs, position_ids = tensors(129, torch.float32), positions(129)
    first, second = (run(inputs, position_ids, **KINDS["interleaved"]) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_tables_follow_positions_changed_in_place() -> None:
    inputs, position_ids = tensors(9, torch.float64), positions(9)
    run(inputs, position_ids)
    position_ids += 1
    truth = run(inputs, position_ids, "reference")
    torch.testing.assert_close(run(inputs, position_ids)["q"], truth["q"], rtol=0, atol=1e-12)


def test_mixed_weight_dtype() -> None:
    inputs, position_ids = tensors(9, torch.bfloat16), positions(9)
    inputs[2], inputs[3] = (x.detach().float().requires_grad_() for x in inputs[2:4])
    truth, mine = run(inputs, position_ids, "reference"), run(inputs, position_ids, "cpu")
    assert mine["q"].dtype == torch.bfloat16 and mine["grad_q_weight"].dtype == torch.float32
    torch.testing.assert_close(mine["q"], truth["q"], rtol=0, atol=0)


def test_opcheck() -> None:
    leaves = tensors(7, torch.float32)[:4]
    settings = (positions(7), 1e4, [0] * 16, 1e-6, None)
    torch.library.opcheck(torch.ops.r4b_kernels.qk_norm_mrope.default, (*leaves, *settings))
    q, k, *weights = (x.detach() for x in leaves)
    torch.library.opcheck(torch.ops.r4b_kernels.qk_norm_mrope_backward.default, (q, k, q, k, *weights, *settings))


def test_compile_fullgraph() -> None:
    leaves = tensors(7, torch.float32)[:4]
    position_ids = positions(7)

    def step(*x: Tensor) -> Tensor:
        q, k = qk_norm_mrope(*x, position_ids, theta=1e4, sections=[6, 5, 5], interleaved=True)
        return q.sin().sum() + k.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4)}, "q has shape"),
        ({"k": torch.zeros(7, 2, 8)}, "k has shape"),
        ({"k": torch.zeros(8, 2, 8).double()}, "k torch.float64"),
        ({"q": torch.zeros(8, 4, 7), "k": torch.zeros(8, 4, 7)}, "D=7"),
        ({"k_weight": torch.zeros(4)}, "k_weight is"),
        ({"position_ids": torch.zeros(8, dtype=torch.int64)}, r"position_ids .* \[3, 8\]"),
        ({"position_ids": torch.zeros(3, 8)}, "position_ids is torch.float32"),
        ({"sections": [2, 1, 2]}, r"sections=\[2, 1, 2\].*4"),
        ({"sections": [4]}, "three counts"),
        ({"q_weight": torch.zeros(8, device="meta")}, "q_weight is on meta"),
        ({"backend": "triton"}, "triton.*cpu.*reference"),
    ],
)
def test_user_errors(change: dict, message: str) -> None:
    good = {"q": torch.zeros(8, 4, 8), "k": torch.zeros(8, 2, 8), "q_weight": torch.ones(8), "k_weight": torch.ones(8)}
    arguments = {**good, "position_ids": torch.zeros(3, 8, dtype=torch.int64), "theta": 1e4, **change}
    with pytest.raises(ValueError, match=message) as caught:
        qk_norm_mrope(**arguments)
    assert isinstance(caught.value, BackendError) == ("backend" in change)


def test_reference_is_differentiable_by_autograd() -> None:
    inputs, position_ids = tensors(6, torch.float64), positions(6)
    outputs = reference.qk_norm_mrope(*inputs[:4], position_ids, 1e4, [], 1e-6)
    grads = torch.autograd.grad(outputs, inputs[:4], inputs[4:])
    truth = run(inputs, position_ids)
    for mine, key in zip(grads, NAMES[2:], strict=True):
        torch.testing.assert_close(mine, truth[key], rtol=0, atol=1e-12)
