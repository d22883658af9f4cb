"""PackedBatch: one micro-batch as a flat stream of tokens with its images.

Shapes: T tokens, S segments, R loss rows, P patches, I images, C values per patch (3 * patch_size^2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from r4b_kernels.layout import PrefixLayout


@dataclass
class LossRows:
    """The loss rows whose hidden state lies on one context-parallel rank; ``source`` counts from its first token."""

    source: Tensor
    target: Tensor
    weight: Tensor
    sequence: Tensor
    data: dict[str, Tensor]


@dataclass
class PackedBatch:
    """Several sequences in one stream; SFT and RL use the same form.

    An SFT sample is one segment. A BPO group is one prompt segment (its image tokens once) and one segment per response
    whose parent it is. A *loss row* is a (hidden state, next token) pair: ``row_source[r]`` is the stream index of the
    hidden state that predicts ``row_target[r]``. Usually that is the token before; the first token of a response is
    predicted by the prompt's last hidden state, which is therefore gathered once per response.

    Attributes:
        tokens: int64 [T].
        position_ids: int64 [3, T] (time, height, width); a response continues its prompt's positions.
        layout: PrefixLayout over the T tokens; tokens after ``layout.offsets[-1]`` are padding.
        row_source: int64 [R], index into the stream.
        row_target: int64 [R], the token to predict; negative marks padding.
        row_weight: float32 [R], carries every loss reduction.
        row_sequence: int64 [R], which response of ``sequences`` the row belongs to.
        row_data: float32 [R] columns that a loss needs (old_logprob, ref_logprob, advantage, ...).
        patches: float32 [P, C], patches of all images, each image's rows in raster order.
        image_grid: int64 [I, 3], (time, height, width) of each image in patches.
        vision_index: int64 [T], the ViT feature (patch row) that replaces the token's embedding; -1 for text and
            -2 for the learned row separator ``image_newline``.
        num_sequences: how many responses the rows belong to.
    """

    tokens: Tensor
    position_ids: Tensor
    layout: PrefixLayout
    row_source: Tensor
    row_target: Tensor
    row_weight: Tensor
    row_sequence: Tensor
    patches: Tensor
    image_grid: Tensor
    vision_index: Tensor
    num_sequences: int
    row_data: dict[str, Tensor] = field(default_factory=dict)

    NEWLINE_INDEX: ClassVar[int] = -2
    TEXT_INDEX: ClassVar[int] = -1

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.numel()

    @property
    def num_rows(self) -> int:
        return self.row_target.numel()

    @property
    def cu_patches(self) -> Tensor:
        """int32 [I+1], where each image's patches begin: cu_seqlens for the ViT's attention."""
        sizes = self.image_grid.prod(dim=1)
        return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)

    def rows(self, start: int = 0, stop: int | None = None) -> LossRows:
        """The loss rows whose source lies in ``[start, stop)``; all of them by default."""
        stop = self.num_tokens if stop is None else stop
        if (start, stop) == (0, self.num_tokens):
            return LossRows(self.row_source, self.row_target, self.row_weight, self.row_sequence, self.row_data)
        mine = ((self.row_source >= start) & (self.row_source < stop)).nonzero().squeeze(1)
        data = {name: column[mine] for name, column in self.row_data.items()}
        return LossRows(
            self.row_source[mine] - start, self.row_target[mine], self.row_weight[mine], self.row_sequence[mine], data
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        rows = {name: value.to(device) for name, value in self.row_data.items()}
        return replace(self, **moved, layout=self.layout.to(device), row_data=rows)
