"""transformers' Qwen3-VL at a small size, its weights under Megatron's names, and prompts for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig as TheirConfig
from transformers import Qwen3VLForConditionalGeneration

from r4b_core.data.batch import PackedBatch
from r4b_core.models.qwen3_vl.config import Qwen3VLConfig
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt

# No two sizes agree that could hide a transposed or swapped dimension; DeepStack's layers are not the first ones.
SMALL: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=64,
    rope_theta=5e3,
    mrope_sections=(3, 3, 2),
    patch_size=4,
    vision_num_layers=4,
    vision_hidden_size=24,
    vision_ffn_hidden_size=40,
    vision_num_heads=3,
    vision_position_side=5,
    deepstack_layers=(1, 2),
)
IMAGE_TOKEN = 63


def their_config(shape: Qwen3VLConfig) -> TheirConfig:
    return TheirConfig(
        text_config=dict(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=shape.norm_eps,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=shape.rope_theta,
                mrope_section=list(shape.mrope_sections),
                mrope_interleaved=True,
            ),
            tie_word_embeddings=shape.tie_embeddings,
        ),
        vision_config=dict(
            depth=shape.vision_num_layers,
            hidden_size=shape.vision_hidden_size,
            intermediate_size=shape.vision_ffn_hidden_size,
            num_heads=shape.vision_num_heads,
            patch_size=shape.patch_size,
            temporal_patch_size=shape.temporal_patch_size,
            spatial_merge_size=shape.merge_size,
            out_hidden_size=shape.hidden_size,
            num_position_embeddings=shape.vision_position_side**2,
            deepstack_visual_indexes=list(shape.deepstack_layers),
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN - 1,
        tie_word_embeddings=shape.tie_embeddings,
    )


def make_oracle(shape: Qwen3VLConfig, seed: int = 0, std: float = 0.2) -> Qwen3VLForConditionalGeneration:
    """Random weights everywhere, norms and biases too."""
    config = their_config(shape)
    config._attn_implementation = "eager"
    oracle = Qwen3VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return oracle


def their_patches(patches: Tensor, shape: Qwen3VLConfig) -> Tensor:
    """Our patches as transformers' processor lays them out: every channel's frames one after the other."""
    repeated = patches.view(len(patches), 3, -1).repeat_interleave(shape.temporal_patch_size, 1)
    return repeated.flatten(1)


def random_prompt(
    generator: torch.Generator, shape: Qwen3VLConfig, before: int, grids: Sequence[tuple[int, int]] = (), after: int = 1
) -> Qwen3VLPrompt:
    """``before`` text tokens, images of the given (rows, columns) of patches with a token between, ``after`` tokens."""
    index = [PackedBatch.TEXT_INDEX] * before
    patches, block = 0, shape.merge_size**2
    for number, (rows, columns) in enumerate(grids):
        index += [PackedBatch.TEXT_INDEX] if number else []
        index += range(patches, patches + rows * columns, block)
        patches += rows * columns
    vision_index = torch.tensor(index + [PackedBatch.TEXT_INDEX] * after)
    tokens = torch.randint(0, IMAGE_TOKEN - 1, (len(vision_index),), generator=generator)
    return Qwen3VLPrompt(
        torch.where(vision_index >= 0, IMAGE_TOKEN, tokens),
        vision_index,
        torch.randn(patches, shape.patch_dim, generator=generator),
        torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64).view(-1, 3),
        shape.merge_size,
    )


def their_logits(
    oracle: Qwen3VLForConditionalGeneration, shape: Qwen3VLConfig, prompt: Qwen3VLPrompt, response: Sequence[int]
) -> Tensor:
    """Logits [len(response), V] of the response's tokens; transformers finds the positions itself."""
    tokens = torch.cat([prompt.tokens, torch.tensor(list(response), dtype=torch.int64)])[None]
    oracle.model.rope_deltas = None
    images: dict[str, Tensor] = {}
    if len(prompt.image_grid):
        images = dict(
            pixel_values=their_patches(prompt.patches, shape),
            image_grid_thw=prompt.image_grid,
            mm_token_type_ids=(tokens == IMAGE_TOKEN).int(),
        )
    logits = oracle(input_ids=tokens, **images).logits[0]
    return logits[prompt.num_tokens - 1 : -1]


def to_megatron(values: dict[str, Tensor], shape: Qwen3VLConfig) -> dict[str, Tensor]:
    """Parameters of transformers' model, or their gradients, under the names and in the layout of ours."""
    lm = "model.language_model."
    out = vision_to_megatron(
        {name.removeprefix("model.visual."): x for name, x in values.items() if name.startswith("model.visual.")}, shape
    )
    out = {f"vision.{name}": x for name, x in out.items()}
    out["embedding.word_embeddings.weight"] = values[lm + "embed_tokens.weight"]
    out["decoder.final_layernorm.weight"] = values[lm + "norm.weight"]
    if not shape.tie_embeddings:
        out["output_layer.weight"] = values["lm_head.weight"]
    for layer in range(shape.num_layers):
        old, new = f"{lm}layers.{layer}.", f"decoder.layers.{layer}."
        heads = [values[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        gate_up = [values[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        out |= {
            new + "input_layernorm.weight": values[old + "input_layernorm.weight"],
            new + "pre_mlp_layernorm.weight": values[old + "post_attention_layernorm.weight"],
            new + "self_attention.linear_qkv.weight": _by_group(heads, shape.num_kv_heads),
            new + "self_attention.linear_proj.weight": values[old + "self_attn.o_proj.weight"],
            new + "self_attention.q_layernorm.weight": values[old + "self_attn.q_norm.weight"],
            new + "self_attention.k_layernorm.weight": values[old + "self_attn.k_norm.weight"],
            new + "mlp.linear_fc1.weight": torch.cat(gate_up),
            new + "mlp.linear_fc2.weight": values[old + "mlp.down_proj.weight"],
        }
    return out


def vision_to_megatron(values: dict[str, Tensor], shape: Qwen3VLConfig) -> dict[str, Tensor]:
    """The same for the vision tower alone."""
    out = {"position.weight": values["pos_embed.weight"]}
    mergers = {"merger": "merger"}
    mergers |= {f"deepstack_merger_list.{i}": f"deepstack.{i}" for i in range(len(shape.deepstack_layers))}
    for kind in ("weight", "bias"):
        patch = values[f"patch_embed.proj.{kind}"]
        out[f"patch_embed.{kind}"] = patch.flatten(1) if kind == "weight" else patch
        for old, new in mergers.items():
            for part in ("norm", "linear_fc1", "linear_fc2"):
                out[f"{new}.{part}.{kind}"] = values[f"{old}.{part}.{kind}"]
        for layer in range(shape.vision_num_layers):
            old, new = f"blocks.{layer}.", f"blocks.layers.{layer}."
            heads = values[f"{old}attn.qkv.{kind}"].chunk(3)
            out |= {
                f"{new}input_layernorm.{kind}": values[f"{old}norm1.{kind}"],
                f"{new}pre_mlp_layernorm.{kind}": values[f"{old}norm2.{kind}"],
                f"{new}self_attention.linear_qkv.{kind}": _by_group(heads, shape.vision_num_heads),
                f"{new}self_attention.linear_proj.{kind}": values[f"{old}attn.proj.{kind}"],
                f"{new}mlp.linear_fc1.{kind}": values[f"{old}mlp.linear_fc1.{kind}"],
                f"{new}mlp.linear_fc2.{kind}": values[f"{old}mlp.linear_fc2.{kind}"],
            }
    return out


def _by_group(heads: Sequence[Tensor], groups: int) -> Tensor:
    """q, k, v projections -> one, laid out by key/value group: the group's queries, its key, its value."""
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in heads]
    return torch.cat(parts, dim=1).flatten(0, 1)
