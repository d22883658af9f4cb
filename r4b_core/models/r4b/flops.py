"""FLOPs of R-4B on a batch: what an update must compute, and so what sharing prompts can save at most.

A multiply-add counts as two. Only matrix products count: linear layers, attention pairs that the mask lets through
(causal half counted as half), the head on loss rows, the ViT. Norms, rope, softmax and the optimizer do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from r4b_core.data.batch import PackedBatch
from r4b_core.models.r4b.config import R4BConfig
from r4b_kernels.layout import PrefixLayout


@dataclass(frozen=True)
class Flops:
    """FLOPs by part: decoder linear layers, decoder attention, head, ViT with its attention, projector."""

    linear: int = 0
    attention: int = 0
    head: int = 0
    vision: int = 0
    projector: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def update(self, vision_frozen: bool = False) -> int:
        """Forward and backward: three times the forward, once for a frozen ViT."""
        return 3 * (self.total - self.vision) + (1 if vision_frozen else 3) * self.vision


def attention_pairs(layout: PrefixLayout) -> int:
    """(query, key) pairs that attend: the number of True in ``layout.dense_mask``."""
    lengths, parents = layout.lengths(), layout.parent.tolist()
    own = sum(n * (n + 1) // 2 for n in lengths)
    return own + sum(n * lengths[parent] for n, parent in zip(lengths, parents, strict=True) if parent >= 0)


def forward_flops(config: R4BConfig, batches: Iterable[PackedBatch]) -> Flops:
    """Forward FLOPs of some batches. Padding tokens do not count; a batch without images has no vision."""
    total = Flops()
    for batch in batches:
        tokens, patches = int(batch.layout.offsets[-1]), len(batch.patches)
        image_pairs = int((batch.image_grid.prod(1) ** 2).sum())
        heads, hidden, eyes = config.num_heads + 2 * config.num_kv_heads, config.hidden_size, config.vision_hidden_size
        layer = heads * config.head_dim * hidden + config.num_heads * config.head_dim * hidden
        layer += 3 * hidden * config.ffn_hidden_size
        vision_layer = 4 * eyes * eyes + 2 * eyes * config.vision_ffn_hidden_size
        pairs = attention_pairs(batch.layout)
        total += Flops(
            linear=2 * tokens * config.num_layers * layer,
            attention=4 * pairs * config.num_layers * config.num_heads * config.head_dim,
            head=2 * batch.num_rows * hidden * config.vocab_size,
            vision=2 * patches * (config.patch_dim * eyes + config.vision_num_layers * vision_layer)
            + 4 * image_pairs * config.vision_num_layers * eyes,
            projector=2 * patches * hidden * (eyes + hidden),
        )
    return total
