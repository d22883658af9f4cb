"""A packed stream whose prompts hold images, against transformers' Qwen3-VL on every sequence alone.

A response counts on from its prompt's largest position, which with images is less than the prompt's length.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_kernels import PrefixLayout, prefix_attention, qk_norm_mrope

transformers = pytest.importorskip("transformers", reason="transformers is an oracle, not a dependency of the kernels")
qwen3_vl = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")

IMAGE, SECTIONS, THETA = 90, [6, 5, 5], 1e4
GRIDS = [[(1, 4, 6)], [(1, 2, 2), (1, 8, 4)]]  # the images of either prompt, in patches; four of them make a token
RESPONSES = [[3, 1, 4], [2, 6]]


def config() -> Any:
    text = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=1, head_dim=32)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": THETA, "mrope_section": SECTIONS}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24)
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    built = transformers.Qwen3VLModel._from_config(config(), attn_implementation="sdpa")
    for norm in (built.language_model.layers[0].self_attn.q_norm, built.language_model.layers[0].self_attn.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)  # ones would hide a missing weight
    return built


def prompt(images: list[tuple[int, int, int]]) -> Tensor:
    """Two words before every image and one at the end."""
    words = [torch.randint(1, 80, (2,)).tolist() + [IMAGE] * (t * h * w // 4) for t, h, w in images]
    return torch.tensor([token for part in words for token in part] + [5])


def rope_index(model: Any, ids: Tensor, images: list[tuple[int, int, int]]) -> Tensor:
    """transformers' positions [3, n] of one sequence."""
    kinds = (ids == IMAGE).int()[None]
    return model.get_rope_index(ids[None], kinds, image_grid_thw=torch.tensor(images))[0][:, 0]


def packed_and_alone(model: Any) -> tuple[PrefixLayout, Tensor, list[tuple[Tensor, Tensor]]]:
    """Layout, packed positions [3, T], and for each response (the packed rows of its sequence, its positions)."""
    lengths, parents, positions, alone, end = [], [], [], [], 0
    for images, sizes in zip(GRIDS, RESPONSES, strict=True):
        ids = prompt(images)
        shared = rope_index(model, ids, images)
        rows, parent, end = torch.arange(end, end + len(ids)), len(lengths), end + len(ids)
        lengths, parents, positions = [*lengths, len(ids)], [*parents, -1], [*positions, shared]
        for size in sizes:
            own = int(shared.max()) + 1 + torch.arange(size).expand(3, size)
            whole = rope_index(model, torch.cat([ids, torch.randint(1, 80, (size,))]), images)
            alone.append((torch.cat([rows, torch.arange(end, end + size)]), whole))
            end += size
            lengths, parents, positions = [*lengths, size], [*parents, parent], [*positions, own]
    return PrefixLayout.from_lengths(lengths, parents), torch.cat(positions, 1), alone


def test_responses_count_on_from_the_largest_position(model: Any) -> None:
    layout, positions, alone = packed_and_alone(model)
    for rows, expected in alone:
        assert torch.equal(positions[:, rows], expected)
    assert int(positions.max()) < max(len(rows) for rows, _ in alone) - 1  # images do take fewer positions than tokens


def test_attention_block_of_qwen3_vl(model: Any) -> None:
    """Projections, norms, interleaved rotary and attention: values, and gradients of states and weights."""
    layout, positions, alone = packed_and_alone(model)
    block, rotary = model.language_model.layers[0].self_attn, model.language_model.rotary_emb
    tokens = positions.shape[1]
    states, seeds = torch.randn(tokens, 24, requires_grad=True), torch.randn(tokens, 24)
    parameters = [states, *block.parameters()]

    q, k, v = (linear(states).view(tokens, -1, 32) for linear in (block.q_proj, block.k_proj, block.v_proj))
    norms = (block.q_norm.weight, block.k_norm.weight)
    q, k = qk_norm_mrope(q, k, *norms, positions, theta=THETA, sections=SECTIONS, interleaved=True)
    ours = block.o_proj(prefix_attention(q, k, v, layout).flatten(1))
    gradients = torch.autograd.grad((ours * seeds).sum(), parameters)

    expected = [torch.zeros_like(parameter) for parameter in parameters]
    seen = torch.zeros(tokens, dtype=torch.bool)
    for rows, positions_alone in alone:
        cos_sin = rotary(states, positions_alone[:, None])
        theirs, _ = block(states[None, rows], cos_sin, None)
        torch.testing.assert_close(ours[rows].detach(), theirs[0].detach(), rtol=1e-5, atol=2e-6)
        part = torch.autograd.grad((theirs[0] * seeds[rows] * ~seen[rows][:, None]).sum(), parameters)
        expected = [total + gradient for total, gradient in zip(expected, part, strict=True)]
        seen[rows] = True
    for mine, theirs in zip(gradients, expected, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
