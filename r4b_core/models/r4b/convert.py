"""R-4B's names and settings in a Hugging Face checkpoint (``RForConditionalGeneration``, or LLaVA-OneVision's own).

The names are those that vLLM's R-4B reads (vllm/model_executor/models/rvl.py): ``model.language_model.*``,
``model.vision_tower.*``, ``model.multi_modal_projector.*``, ``model.image_newline``, ``lm_head.*``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from r4b_core.models.convert.rules import Rule, Shape, by_group, per_layer, rule, stacked, weight_and_bias
from r4b_core.models.convert.settings import Settings
from r4b_core.models.r4b.config import SIZES, R4BConfig

ARCHITECTURES = ("RForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
MOST_LAYERS = 1024
VISION, LANGUAGE, PROJECTOR = (
    "model.vision_tower.vision_model.",
    "model.language_model.",
    "model.multi_modal_projector.",
)

__all__ = ["ARCHITECTURES", "SIZES", "beyond", "canonical", "is_unused", "read_shape", "rules"]

_RENAMED = [
    (re.compile(r"^(?:model\.)?language_model\.model\."), LANGUAGE),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?=vision_tower\.|multi_modal_projector\.|image_newline$)"), "model."),
    (re.compile(r"^model\.vision_tower\.(?!vision_model\.)"), VISION),
]


def canonical(name: str) -> str:
    """The name that is written, for one that transformers before 4.52 or from 5 on may have."""
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name, count=1)
    return name


def rules(shape: R4BConfig) -> list[Rule]:
    vit, hidden = shape.vision_hidden_size, shape.hidden_size
    return [
        *vision_rules(shape, VISION),
        *weight_and_bias("projector.pre_norm", PROJECTOR + "pre_norm", vit),
        *weight_and_bias("projector.linear_1", PROJECTOR + "linear_1", hidden, vit),
        *weight_and_bias("projector.linear_2", PROJECTOR + "linear_2", hidden, hidden),
        rule("image_newline", "model.image_newline", hidden),
        *decoder_rules(shape, LANGUAGE),
    ]


def vision_rules(shape: R4BConfig, prefix: str) -> list[Rule]:
    """SigLIP's layers, as many as the model has."""
    hidden, ffn = shape.vision_hidden_size, shape.vision_ffn_hidden_size
    qkv = [
        rule(
            f"self_attention.linear_qkv.{kind}",
            {f"self_attn.{x}_proj.{kind}": size for x in "qkv"},
            transform=by_group(shape.vision_num_heads),
        )
        for kind, size in (("weight", (hidden, hidden)), ("bias", (hidden,)))
    ]
    layer = [
        *weight_and_bias("input_layernorm", "layer_norm1", hidden),
        *qkv,
        *weight_and_bias("self_attention.linear_proj", "self_attn.out_proj", hidden, hidden),
        *weight_and_bias("pre_mlp_layernorm", "layer_norm2", hidden),
        *weight_and_bias("mlp.linear_fc1", "mlp.fc1", ffn, hidden),
        *weight_and_bias("mlp.linear_fc2", "mlp.fc2", hidden, ffn),
    ]
    embeddings = prefix + "embeddings."
    size, (rows, columns) = shape.patch_size, shape.vision_grid
    return [
        *weight_and_bias("vision.patch_embed", embeddings + "patch_embedding", hidden, 3, size, size),
        rule("vision.position.weight", embeddings + "position_embedding.weight", rows * columns, hidden),
        *per_layer(shape.vision_num_layers, "vision.blocks.layers.{}.", prefix + "encoder.layers.{}.", layer),
    ]


def decoder_rules(shape: Any, prefix: str) -> list[Rule]:
    """Qwen3's layers; a tied head has no tensor of its own."""
    hidden, ffn, dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    query, key = shape.num_heads * dim, shape.num_kv_heads * dim
    heads = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
    }
    gate_up = {f"mlp.{x}_proj.weight": (ffn, hidden) for x in ("gate", "up")}
    layer = [
        rule("input_layernorm.weight", "input_layernorm.weight", hidden),
        rule("self_attention.linear_qkv.weight", heads, transform=by_group(shape.num_kv_heads)),
        rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", dim),
        rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", dim),
        rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, query),
        rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
        rule("mlp.linear_fc1.weight", gate_up, transform=stacked()),
        rule("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn),
    ]
    head = [] if shape.tie_embeddings else [rule("output_layer.weight", "lm_head.weight", shape.vocab_size, hidden)]
    return [
        rule("embedding.word_embeddings.weight", prefix + "embed_tokens.weight", shape.vocab_size, hidden),
        *per_layer(shape.num_layers, "decoder.layers.{}.", prefix + "layers.{}.", layer),
        rule("decoder.final_layernorm.weight", prefix + "norm.weight", hidden),
        *head,
    ]


def is_unused(name: str, shape: R4BConfig) -> bool:
    """Tensors that a checkpoint may have and the model does not use: what comes after the layer that is looked at."""
    if not name.startswith(VISION):
        return False
    rest = name.removeprefix(VISION)
    layer = re.match(r"encoder\.layers\.(\d+)\.", rest)
    if layer:
        return int(layer[1]) >= shape.vision_num_layers
    return rest.startswith(("post_layernorm.", "head.")) or rest == "embeddings.position_ids"


def beyond(config: Mapping[str, Any], shape: R4BConfig) -> dict[str, tuple[Shape, float | None]]:
    """Tensors that a ``config.json`` describes and the model does not use: shape, and what to fill it with if missing.

    None: nothing can stand for it. The ViT's last norm acts on nothing that is looked at.
    """
    total = replace(shape, vision_num_layers=config["vision_config"].get("num_hidden_layers", 12))
    layers = [rule for rule in vision_rules(total, VISION) if (rule.layer or 0) >= shape.vision_num_layers]
    size = (shape.vision_hidden_size,)
    found: dict[str, tuple[Shape, float | None]] = {
        name: (dims, None) for rule in layers for name, dims in rule.theirs.items()
    }
    return found | {VISION + "post_layernorm.weight": (size, 1.0), VISION + "post_layernorm.bias": (size, 0.0)}


def read_shape(config: Settings) -> dict[str, Any]:
    """The fields of R4BConfig that a ``config.json`` fixes."""
    vision, text = config.section("vision_config"), config.section("text_config")
    text.expect("model_type", "qwen3")
    vision.expect("model_type", "siglip_vision_model", "siglip2_vision_model")
    config.expect("projector_hidden_act", "gelu", otherwise="gelu")
    config.expect("vision_feature_select_strategy", "full", otherwise="full")
    config.expect("multimodal_projector_bias", True, otherwise=True)
    return vision_shape(vision, config.get("vision_feature_layer", -1)) | decoder_shape(text, config.tied())


def vision_shape(vision: Settings, feature_layer: Any = -1) -> dict[str, Any]:
    """A SigLIP ViT whose layers up to ``feature_layer`` are used (-1: all, -2: all but the last)."""
    vision.expect("hidden_act", "gelu_pytorch_tanh", otherwise="gelu_pytorch_tanh")
    vision.expect("layer_norm_eps", 1e-6, otherwise=1e-6)
    vision.expect("num_channels", 3, otherwise=3)
    layers = vision.size("num_hidden_layers", 12, MOST_LAYERS)
    if type(feature_layer) is not int or not -layers <= feature_layer <= layers or feature_layer == 0:
        vision.refuse(f"num_hidden_layers = {layers}, and vision_feature_layer = {feature_layer!r} is none of them")
        feature_layer = -1
    hidden, heads = vision.size("hidden_size", 768), vision.size("num_attention_heads", 12)
    vision.divides("num_attention_heads", "hidden_size", heads, hidden)
    patch, image = vision.size("patch_size", 16), vision.size("image_size", 224)
    side = image // patch
    return dict(
        patch_size=patch,
        vision_grid=[side, side],
        vision_num_layers=feature_layer if feature_layer > 0 else layers + 1 + feature_layer,
        vision_hidden_size=hidden,
        vision_ffn_hidden_size=vision.size("intermediate_size", 3072),
        vision_num_heads=heads,
    )


def decoder_shape(text: Settings, tied: bool) -> dict[str, Any]:
    """A Qwen3 decoder; what a file leaves out has Qwen3Config's defaults."""
    text.expect("hidden_act", "silu", otherwise="silu")
    text.expect("attention_bias", False, otherwise=False)
    text.expect("use_sliding_window", False, otherwise=False)
    heads = text.size("num_attention_heads", 32)
    groups = text.size("num_key_value_heads", heads)
    text.divides("num_key_value_heads", "num_attention_heads", groups, heads)
    shape = dict(
        num_layers=text.size("num_hidden_layers", 32, MOST_LAYERS),
        hidden_size=text.size("hidden_size", 4096),
        ffn_hidden_size=text.size("intermediate_size", 22016),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=text.size("head_dim", 128),
        vocab_size=text.size("vocab_size", 151936),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=text.rope().number("rope_theta", 1e4),
        tie_embeddings=tied,
    )
    if "initializer_range" in text:
        shape["init_std"] = text.number("initializer_range", 0.02)
    return shape
