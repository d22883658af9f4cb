"""Shapes of the Qwen3-VL family, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.models.r4b.config import decoder_settings as qwen3_settings
from r4b_core.models.r4b.config import vision_settings

__all__ = ["SIZES", "Qwen3VLConfig", "decoder_settings", "resolve", "vision_settings"]


@dataclass(frozen=True)
class Qwen3VLConfig:
    """One size. Vision fields are the ViT's, the rest the decoder's.

    Attributes:
        mrope_sections: rotary pairs of time, height and width, interleaved; their sum is head_dim / 2.
        temporal_patch_size: frames that the patch embedding takes; a still image is repeated to fill them.
        merge_size: a token stands for merge_size x merge_size patches.
        vision_position_side: the learned position table has side x side entries.
        deepstack_layers: ViT layers (from 0) whose outputs are added after the decoder's first layers, in this order.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    vision_num_layers: int
    vision_hidden_size: int
    vision_ffn_hidden_size: int
    deepstack_layers: tuple[int, ...]
    vision_num_heads: int = 16
    vision_position_side: int = 48
    vision_rope_theta: float = 1e4
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    rope_theta: float = 5e6
    mrope_sections: tuple[int, int, int] = (24, 20, 20)
    init_std: float = 0.02
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ValueError(
                f"model.shape.mrope_sections: {list(self.mrope_sections)} must share out head_dim / 2 = "
                f"{self.head_dim // 2} pairs"
            )
        if self.vision_hidden_size % (4 * self.vision_num_heads):
            raise ValueError(
                f"model.shape.vision_hidden_size: {self.vision_hidden_size} over vision_num_heads = "
                f"{self.vision_num_heads} must be heads of a multiple of 4: rows and columns turn pairs in each half"
            )
        stack = self.deepstack_layers
        if list(stack) != sorted(set(stack)) or not set(stack) <= set(range(self.vision_num_layers)):
            raise ValueError(
                f"model.shape.deepstack_layers: {list(stack)} must rise and lie in 0 .. {self.vision_num_layers - 1}, "
                "the layers of the vision tower"
            )
        if len(stack) > self.num_layers:
            raise ValueError(
                f"model.shape.deepstack_layers: {len(stack)} of them need as many decoder layers, "
                f"num_layers is {self.num_layers}"
            )

    @property
    def patch_dim(self) -> int:
        """Values of one RGB patch of a still image."""
        return 3 * self.patch_size**2

    @property
    def parts(self) -> tuple[str, ...]:
        """The first parts of all parameters' names."""
        head = () if self.tie_embeddings else ("output_layer",)
        return ("vision", "embedding", "decoder", *head)


_EYES_2B_4B: dict[str, Any] = dict(
    vision_num_layers=24, vision_hidden_size=1024, vision_ffn_hidden_size=4096, deepstack_layers=(5, 11, 17)
)
_EYES_8B: dict[str, Any] = dict(
    vision_num_layers=27, vision_hidden_size=1152, vision_ffn_hidden_size=4304, deepstack_layers=(8, 16, 24)
)
_WORDS: dict[str, Any] = dict(num_kv_heads=8, head_dim=128, vocab_size=151936)

SIZES = {
    "toy": Qwen3VLConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=64,
        rope_theta=1e4,
        mrope_sections=(6, 5, 5),
        init_std=0.08,
        patch_size=8,
        vision_num_layers=3,
        vision_hidden_size=64,
        vision_ffn_hidden_size=128,
        vision_num_heads=2,
        vision_position_side=6,
        deepstack_layers=(0, 1),
    ),
    "2b": Qwen3VLConfig(num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_heads=16, **_WORDS, **_EYES_2B_4B),
    "4b": Qwen3VLConfig(num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_heads=32, **_WORDS, **_EYES_2B_4B),
    "8b": Qwen3VLConfig(
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_heads=32,
        tie_embeddings=False,
        **_WORDS,
        **_EYES_8B,
    ),
}


def resolve(model: ModelConfig) -> Qwen3VLConfig:
    """The named size with the recipe's overrides.

    Raises:
        ValueError: unknown size or shape field, naming what there is, or a shape that contradicts itself.
    """
    if model.size not in SIZES:
        raise ValueError(f"model.size: {model.size!r} is not a size of qwen3_vl; there are {', '.join(SIZES)}")
    fields = {field.name for field in dataclasses.fields(Qwen3VLConfig)}
    if unknown := sorted(set(model.shape) - fields):
        raise ValueError(f"model.shape: unknown field(s) {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    # A recipe file knows lists only.
    shape = {name: tuple(value) if isinstance(value, list) else value for name, value in model.shape.items()}
    return dataclasses.replace(SIZES[model.size], **shape)


def decoder_settings(config: Qwen3VLConfig, parallel: ParallelConfig, dtype: str) -> dict[str, Any]:
    """Qwen3's settings with interleaved M-RoPE.

    Raises:
        ValueError: if a layer that DeepStack adds to would lie on a later pipeline stage than the vision tower.
    """
    stages = parallel.pp * parallel.virtual_stages
    first_stage = config.num_layers // stages
    if first_stage < (needed := len(config.deepstack_layers)):
        setting = "parallel.pp" if parallel.virtual_stages == 1 else "parallel.pp * virtual_stages"
        raise ValueError(
            f"{setting} = {stages}: the first stage would have {first_stage} of {config.num_layers} "
            f"layers, and DeepStack adds to the first {needed}, which must lie with the vision tower; "
            f"take at most {config.num_layers // needed}"
        )
    mrope = dict(mrope_sections=list(config.mrope_sections), mrope_interleaved=True)
    return qwen3_settings(config, parallel, dtype) | mrope
