"""Hugging Face models under "r4b_prefix": packed with shared prompts equals one by one in their own attention.

That is eager in float32. In float64 it is sdpa and torch's RMSNorm, since eager's softmax and the models' norms round
to float32.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from r4b_kernels import PrefixLayout
from r4b_kernels.adapters import huggingface

transformers = pytest.importorskip("transformers")

LENGTHS, PARENTS = [5, 3, 1, 4, 2, 6], [-1, 0, 0, -1, 3, 3]  # two prompts with two responses each


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    huggingface.register()
    huggingface.register()


def qwen3(dtype: torch.dtype, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    config = transformers.Qwen3Config(**{**sizes, **heads, **changes})
    own = "sdpa" if dtype == torch.float64 else "eager"
    model = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation=own, dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.4  # not the kernels' own D ** -0.5
    if dtype == torch.float64:
        for module in model.modules():
            for name, norm in list(module.named_children()):
                if type(norm).__name__ == "Qwen3RMSNorm":
                    exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=dtype)
                    setattr(module, name, exact)
    return model


def sequences(layout: PrefixLayout) -> list[Tensor]:
    """The token rows of each segment with its parent's before them, for segments that nobody continues."""
    offsets, parents = layout.offsets.tolist(), layout.parent.tolist()
    rows = [torch.arange(offsets[s], offsets[s + 1]) for s in range(len(parents))]
    return [torch.cat([rows[p], rows[s]]) if p >= 0 else rows[s] for s, p in enumerate(parents) if s not in parents]


def positions(layout: PrefixLayout, tokens: int) -> Tensor:
    result = torch.zeros(tokens, dtype=torch.int64)
    for rows in sequences(layout):
        result[rows] = torch.arange(len(rows))
    return result


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_by_one(model: Any, ids: Tensor, layout: PrefixLayout, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [T, V] and gradients of sum(logits * weights), every sequence alone. A prompt's own rows count once."""
    model = copy.deepcopy(model)
    logits, seen = torch.zeros_like(weights), torch.zeros(len(ids), dtype=torch.bool)
    for rows in sequences(layout):
        out = model(input_ids=ids[None, rows]).logits[0]
        (out * weights[rows] * ~seen[rows][:, None]).sum().backward()
        logits[rows], seen[rows] = out.detach(), True
    return logits, gradients(model)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("how", ["prefix_layout", "cu_seq_lens", "position_ids"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_one_by_one(how: str, dtype: torch.dtype, bound: float, checkpointing: bool) -> None:
    model = qwen3(dtype).train()
    layout = PrefixLayout.from_lengths(LENGTHS, PARENTS if how == "prefix_layout" else None)
    ids, weights = torch.randint(97, (sum(LENGTHS),)), torch.randn(sum(LENGTHS), 97, dtype=dtype)
    logits, expected = one_by_one(model, ids, layout, weights)

    model.set_attn_implementation("r4b_prefix")
    if checkpointing:
        model.activation_checkpointing_enable()
    given = {
        "prefix_layout": {"prefix_layout": layout},
        "cu_seq_lens": {"cu_seq_lens_q": layout.offsets.long()},
        "position_ids": {"use_cache": False},
    }
    out = model(input_ids=ids[None], position_ids=positions(layout, len(ids))[None], **given[how]).logits[0]
    (out * weights).sum().backward()
    torch.testing.assert_close(out.detach(), logits, rtol=bound, atol=bound)
    got = gradients(model)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=bound, atol=bound * 10, msg=name)


@pytest.mark.parametrize("pad", [[(0, 0), (4, 0), (0, 3)], [(0, 2), (0, 0), (1, 2)]])
def test_padded_batches_agree_on_their_tokens(pad: list[tuple[int, int]]) -> None:
    """Padding on the left, on the right and on both sides, as trainers of completions have it."""
    model = qwen3(torch.float64)
    ids = torch.randint(97, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.int64)
    for row, (left, right) in enumerate(pad):
        mask[row, :left] = 0
        mask[row, 7 - right :] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    expected = model(**inputs).logits
    model.set_attn_implementation("r4b_prefix")
    torch.testing.assert_close(model(**inputs).logits[mask.bool()], expected[mask.bool()], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(ids[:2]).logits, qwen3(torch.float64)(ids[:2]).logits, rtol=1e-10, atol=1e-10)


def test_what_it_cannot_compute_is_an_error() -> None:
    ids = torch.arange(6)[None]
    model = qwen3(torch.float32).eval()
    model.set_attn_implementation("r4b_prefix")
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="reads no cache"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="not causal in segments"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="give prefix_layout instead"):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="attention_dropout=0"):
        model.model.layers[0].self_attn.attention_dropout = 0.5
        model.train()(ids)
    sliding = qwen3(torch.float32, use_sliding_window=True, sliding_window=3, max_window_layers=0)
    sliding.set_attn_implementation("r4b_prefix")
    with pytest.raises(ValueError, match="sliding_window is set"):
        sliding(ids)


@pytest.mark.parametrize("kind", ["sliding_window_causal_mask_function", "sliding_window_bidirectional_mask_function"])
def test_masks_that_are_no_segments_are_refused(kind: str) -> None:
    """A model need not tell its attention that it has a window: its mask tells."""
    mask = getattr(pytest.importorskip("transformers.masking_utils"), kind)(3)
    with pytest.raises(ValueError, match="not causal in segments"):
        _ = huggingface.mask_segments(1, 6, 6, mask_function=mask).layout


def test_a_given_layout_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the compiled model takes another layout of the same shape without compiling again."""
    looked: list[None] = []
    monkeypatch.setattr(huggingface, "_find_segments", lambda *_: looked.append(None))
    model, ids = qwen3(torch.float32), torch.randint(97, (1, 9))
    model.set_attn_implementation("r4b_prefix")
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=compiles, fullgraph=True)
    for lengths in ([4, 3, 2], [3, 1, 5], [2, 2, 5]):
        layout = PrefixLayout.from_lengths(lengths, [-1, 0, 0])
        inputs = dict(input_ids=ids, position_ids=positions(layout, 9)[None], prefix_layout=layout, use_cache=False)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert compiles.frame_count == 1 and not looked


def qwen3_vl() -> Any:
    torch.manual_seed(0)
    text = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = dict(depth=2, hidden_size=24, intermediate_size=32, num_heads=3, patch_size=4, temporal_patch_size=2)
    vision |= dict(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=90)
    return transformers.Qwen3VLForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", dtype=torch.float64
    )


@pytest.mark.parametrize("one_call", [False, True])
def test_vision_tower_of_qwen3_vl(one_call: bool) -> None:
    tower = qwen3_vl().model.visual
    grid = torch.tensor([[1, 4, 6], [2, 2, 4], [1, 2, 2]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, dtype=torch.float64)
    other = copy.deepcopy(tower)
    expected = tower(patches, grid_thw=grid).pooler_output
    if one_call:
        huggingface.use_vision_attention(other)
    else:
        other.set_attn_implementation("r4b_prefix")
    got = other(patches, grid_thw=grid).pooler_output
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    (expected * seed).sum().backward()
    (got * seed).sum().backward()
    for (name, mine), theirs in zip(other.named_parameters(), tower.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_qwen3_vl_with_images_in_a_shared_prompt() -> None:
    """The whole model, packed: images once, responses counting on from their prompt's largest position."""
    model, grid = qwen3_vl(), torch.tensor([[1, 4, 6], [1, 4, 4]])
    patches = torch.randn(24 + 16, 3 * 2 * 4 * 4, dtype=torch.float64)
    prompt = torch.tensor([3, *[90] * 6, 4, *[90] * 4, 5])
    responses = [torch.tensor([7, 8, 9]), torch.tensor([10]), torch.tensor([11, 12])]
    images = {"pixel_values": patches, "image_grid_thw": grid}
    ids = torch.cat([prompt, *responses])
    weights, seen = torch.randn(len(ids), 97, dtype=torch.float64), torch.zeros(len(ids), dtype=torch.bool)

    alone = copy.deepcopy(model)
    positions, expected = torch.zeros(3, len(ids), dtype=torch.int64), torch.zeros_like(weights)
    layout = PrefixLayout.from_lengths([len(prompt), *map(len, responses)], [-1, 0, 0, 0])
    for rows in sequences(layout):
        kinds = (ids[rows] == 90).int()[None]
        out = alone(input_ids=ids[None, rows], mm_token_type_ids=kinds, **images).logits[0]
        (out * weights[rows] * ~seen[rows][:, None]).sum().backward()
        positions[:, rows] = alone.model.get_rope_index(ids[None, rows], kinds, image_grid_thw=grid)[0][:, 0]
        expected[rows], seen[rows] = out.detach(), True

    model.set_attn_implementation("r4b_prefix")
    huggingface.use_vision_attention(model.model.visual)
    out = model(input_ids=ids[None], position_ids=positions[:, None], prefix_layout=layout, **images).logits[0]
    (out * weights).sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-6)  # norms round to float32
    got, wanted = gradients(model), gradients(alone)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=2e-6 * float(gradient.abs().max() + 1), msg=name)
