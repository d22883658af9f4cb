"""Qwen3-VL's names and settings in a Hugging Face checkpoint (``Qwen3VLForConditionalGeneration``)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from r4b_core.models.convert.rules import Rule, Shape, fused_by_group, per_layer, rule, weight_and_bias
from r4b_core.models.convert.settings import Settings
from r4b_core.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from r4b_core.models.r4b.convert import MOST_LAYERS, decoder_rules, decoder_shape

ARCHITECTURES = ("Qwen3VLForConditionalGeneration",)
VISION, LANGUAGE = "model.visual.", "model.language_model."

__all__ = ["ARCHITECTURES", "SIZES", "beyond", "canonical", "is_unused", "read_shape", "rules"]

_RENAMED = [
    (re.compile(r"^visual\."), VISION),
    (re.compile(r"^(?:language_model\.model|model)\.(?=layers\.|embed_tokens\.|norm\.)"), LANGUAGE),
]


def canonical(name: str) -> str:
    """The name that is written, for one of a checkpoint whose towers stand at the top."""
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name, count=1)
    return name


def rules(shape: Qwen3VLConfig) -> list[Rule]:
    hidden, ffn, size = shape.vision_hidden_size, shape.vision_ffn_hidden_size, shape.patch_size
    qkv = [
        rule(
            f"self_attention.linear_qkv.{kind}",
            f"attn.qkv.{kind}",
            *dims,
            transform=fused_by_group(shape.vision_num_heads),
        )
        for kind, dims in (("weight", (3 * hidden, hidden)), ("bias", (3 * hidden,)))
    ]
    layer = [
        *weight_and_bias("input_layernorm", "norm1", hidden),
        *qkv,
        *weight_and_bias("self_attention.linear_proj", "attn.proj", hidden, hidden),
        *weight_and_bias("pre_mlp_layernorm", "norm2", hidden),
        *weight_and_bias("mlp.linear_fc1", "mlp.linear_fc1", ffn, hidden),
        *weight_and_bias("mlp.linear_fc2", "mlp.linear_fc2", hidden, ffn),
    ]
    # The patch convolution over all its frames: the model repeats a still image, and its weight keeps every frame's.
    kernel = (3, shape.temporal_patch_size, size, size)
    deepstack = [
        rule
        for number in range(len(shape.deepstack_layers))
        for rule in _merger(shape, f"deepstack.{number}", f"deepstack_merger_list.{number}", norm_merged=True)
    ]
    return [
        *weight_and_bias("vision.patch_embed", VISION + "patch_embed.proj", hidden, *kernel),
        rule("vision.position.weight", VISION + "pos_embed.weight", shape.vision_position_side**2, hidden),
        *per_layer(shape.vision_num_layers, "vision.blocks.layers.{}.", VISION + "blocks.{}.", layer),
        *_merger(shape, "merger", "merger", norm_merged=False),
        *deepstack,
        *decoder_rules(shape, LANGUAGE),
    ]


def _merger(shape: Qwen3VLConfig, ours: str, theirs: str, norm_merged: bool) -> list[Rule]:
    hidden = shape.vision_hidden_size
    width = hidden * shape.merge_size**2
    ours, theirs = f"vision.{ours}.", f"{VISION}{theirs}."
    return [
        *weight_and_bias(ours + "norm", theirs + "norm", width if norm_merged else hidden),
        *weight_and_bias(ours + "linear_fc1", theirs + "linear_fc1", width, width),
        *weight_and_bias(ours + "linear_fc2", theirs + "linear_fc2", shape.hidden_size, width),
    ]


def is_unused(name: str, shape: Qwen3VLConfig) -> bool:
    """Buffers that some versions of transformers wrote."""
    return name.endswith(".inv_freq")


def beyond(config: Mapping[str, Any], shape: Qwen3VLConfig) -> dict[str, tuple[Shape, float | None]]:
    """Tensors that a ``config.json`` describes and the model does not use: none."""
    return {}


def read_shape(config: Settings) -> dict[str, Any]:
    """The fields of Qwen3VLConfig that a ``config.json`` fixes."""
    vision, text = config.section("vision_config"), config.section("text_config")
    vision.expect("hidden_act", "gelu_pytorch_tanh", otherwise="gelu_pytorch_tanh")
    vision.expect("in_channels", 3, otherwise=3)
    text.rope().expect("mrope_interleaved", True, otherwise=True)
    shape = decoder_shape(text, config.tied())
    vision.expect("out_hidden_size", shape["hidden_size"], otherwise=3584)
    places = vision.size("num_position_embeddings", 2304)
    side = math.isqrt(places)
    if side**2 != places:
        vision.refuse(f"num_position_embeddings = {places} is not a square table")
    hidden, heads = vision.size("hidden_size", 1152), vision.size("num_heads", 16)
    vision.divides("num_heads", "hidden_size", heads, hidden)
    shape["rope_theta"] = text.rope().number("rope_theta", 5e5)
    return shape | dict(
        mrope_sections=text.rope().sizes("mrope_section", [24, 20, 20]),
        vision_num_layers=vision.size("depth", 27, MOST_LAYERS),
        vision_hidden_size=hidden,
        vision_ffn_hidden_size=vision.size("intermediate_size", 4304),
        vision_num_heads=heads,
        vision_position_side=side,
        patch_size=vision.size("patch_size", 16),
        temporal_patch_size=vision.size("temporal_patch_size", 2),
        merge_size=vision.size("spatial_merge_size", 2),
        deepstack_layers=vision.sizes("deepstack_visual_indexes", [8, 16, 24], least=0),
    )
