"""Shapes of the models that can be planned for, and their parameter counts by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r4b_core.models.r4b.config import R4BConfig


@dataclass(frozen=True)
class Decoder:
    """A decoder of pre-norm layers: grouped-query attention and a SwiGLU MLP, both without bias unless said."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Of keys, or of values."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Entries of one layer's weight matrices: the multiply-adds of a token."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        bias = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        return self.layer_matrices + bias + self.layer_whole

    @property
    def layer_whole(self) -> int:
        """Of these, the ones that every tensor-parallel rank holds: norms."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        """Of the table, which is also the head where tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        tables = 1 if self.tied else 2
        return self.num_layers * self.layer_parameters + self.hidden_size + tables * self.embedding_parameters


@dataclass(frozen=True)
class Vision:
    """A ViT and what joins it to the decoder.

    Attributes:
        num_positions: rows of the learned position table; 0 for rotary only.
        merge: patches of one visual token (1: LLaVA style, 4: 2 x 2 merging).
        middle: width between the two projector matrices.
        projectors: how many projectors (DeepStack has one more per level).
        projector_norm: parameters of all projectors' norms together.
        projector_split: tensor-parallel ranks share the projectors' matrices; else each holds them all.
        extra: parameters outside any matrix (R-4B's row separator).
        gated: a gated MLP (three matrices) and RMSNorm, else two matrices and LayerNorm.
        window: patches that attend to each other outside ``global_layers``, such as a tile's; 0 means the whole image.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    patch_dim: int
    merge: int
    middle: int
    output_size: int
    projector_norm: int
    num_positions: int = 0
    patch_bias: bool = True
    projectors: int = 1
    projector_split: bool = True
    extra: int = 0
    gated: bool = False
    window: int = 0
    global_layers: int = 0

    @property
    def deepstack(self) -> int:
        """How many of the decoder's first layers it adds to: each has a projector of its own."""
        return self.projectors - 1

    @property
    def layer_matrices(self) -> int:
        return self.hidden_size * (4 * self.hidden_size + (3 if self.gated else 2) * self.ffn_hidden_size)

    @property
    def layer_parameters(self) -> int:
        split_biases = 3 * self.hidden_size + (2 if self.gated else 1) * self.ffn_hidden_size
        return self.layer_matrices + split_biases + self.layer_whole

    @property
    def layer_whole(self) -> int:
        """Of these, the ones that every tensor-parallel rank holds: norms, and biases added to the residual."""
        return ((2 if self.gated else 4) + 2) * self.hidden_size

    @property
    def projector_matrices(self) -> int:
        """Multiply-adds of one visual token in one projector."""
        return self.merge * self.hidden_size * self.middle + self.middle * self.output_size

    @property
    def input_parameters(self) -> int:
        """Of the patch embedding and the position table."""
        patch = self.patch_dim * self.hidden_size + (self.hidden_size if self.patch_bias else 0)
        return patch + self.num_positions * self.hidden_size

    @property
    def projector_parameters(self) -> int:
        return self.projectors * (self.projector_matrices + self.middle) + self._projector_rest

    @property
    def projector_whole(self) -> int:
        """Of these, the ones that every tensor-parallel rank holds: norms and last biases, or all."""
        return self._projector_rest if self.projector_split else self.projector_parameters

    @property
    def _projector_rest(self) -> int:
        return self.projectors * self.output_size + self.projector_norm + self.extra

    @property
    def parameters(self) -> int:
        return self.input_parameters + self.num_layers * self.layer_parameters + self.projector_parameters

    def attention_pairs(self, patches: int) -> float:
        """(query, key) pairs of one image, over all layers."""
        window = min(self.window, patches) if self.window else patches
        local_layers = self.num_layers - self.global_layers if self.window else 0
        return float(patches) * (local_layers * window + (self.num_layers - local_layers) * patches)


@dataclass(frozen=True)
class ModelShape:
    name: str
    decoder: Decoder
    vision: Vision | None = None

    @property
    def parameters(self) -> int:
        return self.decoder.parameters + (self.vision.parameters if self.vision else 0)


def _llama(name: str, layers: int, hidden: int, ffn: int, heads: int) -> ModelShape:
    return ModelShape(name, Decoder(layers, hidden, ffn, heads, 8, 128, 128256, tied=False))


def _qwen25(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> Decoder:
    return Decoder(layers, hidden, ffn, heads, kv_heads, 128, 152064, tied=False, qkv_bias=True)


def _qwen3_vl(
    name: str, layers: int, hidden: int, ffn: int, heads: int, tied: bool, vit: tuple[int, int, int]
) -> ModelShape:
    vision_layers, width, vision_ffn = vit
    decoder = Decoder(layers, hidden, ffn, heads, 8, 128, 151936, tied=tied, qk_norm=True)
    vision = Vision(
        num_layers=vision_layers,
        hidden_size=width,
        ffn_hidden_size=vision_ffn,
        num_heads=16,
        patch_dim=3 * 2 * 16 * 16,
        merge=4,
        middle=4 * width,
        output_size=hidden,
        projector_norm=2 * width + 3 * 2 * 4 * width,
        num_positions=48 * 48,
        projectors=4,
    )
    return ModelShape(name, decoder, vision)


_QWEN25_7B = _qwen25(28, 3584, 18944, 28, 4)
_QWEN25_VISION = Vision(
    num_layers=32,
    hidden_size=1280,
    ffn_hidden_size=3420,
    num_heads=16,
    patch_dim=3 * 2 * 14 * 14,
    merge=4,
    middle=4 * 1280,
    output_size=3584,
    projector_norm=1280,
    patch_bias=False,
    gated=True,
    window=64,
    global_layers=4,
)

SHAPES = {
    shape.name: shape
    for shape in (
        _llama("llama3.1-8b", 32, 4096, 14336, 32),
        _llama("llama3.1-70b", 80, 8192, 28672, 64),
        ModelShape("qwen2.5-7b", _QWEN25_7B),
        ModelShape("qwen2.5_vl-7b", _QWEN25_7B, _QWEN25_VISION),
        ModelShape("qwen3-4b", Decoder(36, 2560, 9728, 32, 8, 128, 151936, tied=True, qk_norm=True)),
        _qwen3_vl("qwen3_vl-2b", 28, 2048, 6144, 16, True, (24, 1024, 4096)),
        _qwen3_vl("qwen3_vl-4b", 36, 2560, 9728, 32, True, (24, 1024, 4096)),
        _qwen3_vl("qwen3_vl-8b", 36, 4096, 12288, 32, False, (27, 1152, 4304)),
    )
}


def r4b_shape(name: str, config: R4BConfig) -> ModelShape:
    """R-4B's shape from the model's own configuration, so that overrides of a recipe count."""
    decoder = Decoder(
        config.num_layers,
        config.hidden_size,
        config.ffn_hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        tied=config.tie_embeddings,
        qk_norm=True,
    )
    rows, columns = config.vision_grid
    vision = Vision(
        num_layers=config.vision_num_layers,
        hidden_size=config.vision_hidden_size,
        ffn_hidden_size=config.vision_ffn_hidden_size,
        num_heads=config.vision_num_heads,
        patch_dim=config.patch_dim,
        merge=1,
        middle=config.hidden_size,
        output_size=config.hidden_size,
        projector_norm=2 * config.vision_hidden_size,
        num_positions=rows * columns,
        window=rows * columns,
        projector_split=False,
        extra=config.hidden_size,
    )
    return ModelShape(name, decoder, vision)
