"""The R-4B model on Megatron-Core: one pipeline stage of it, or one chunk of a stage.

Shapes: T tokens of the stream, t = T / cp of this rank, R loss rows of this rank, H hidden, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.init import init_weights
from r4b_core.models.layers import DecoderConfig
from r4b_core.models.r4b.config import R4BConfig, decoder_settings, resolve
from r4b_core.models.r4b.vision import Projector, VisionTower
from r4b_core.models.streams import PackedStream, context_chunk
from r4b_core.parallel.device import device
from r4b_kernels import scatter_vision


class R4BModel(DecoderModel):
    """ViT and projector on the first stage, decoder layers over all, final norm and head weight on the last."""

    def __init__(self, config: R4BConfig, parallel: ParallelConfig, dtype: str, chunk: int = 0) -> None:
        super().__init__(DecoderConfig(**decoder_settings(config, parallel, dtype)), config.tie_embeddings, chunk)
        self.shape = config
        if self.pre_process:
            self.vision = VisionTower(config, parallel, dtype)
            self.projector = Projector(config, parallel, dtype)
            self.image_newline = nn.Parameter(
                torch.empty(config.hidden_size, dtype=self.config.params_dtype, device=device())
            )
        self.build_decoder(config.vocab_size)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [R, H] of this rank's loss rows on the last stage, the stream [t, 1, H] on others."""
        start, stop = context_chunk(batch.num_tokens, self.cp_group)
        stream = PackedStream(
            layout=batch.layout, position_ids=batch.position_ids[:, start:stop], context_group=self.cp_group
        )
        embeddings = self.embed(batch, start, stop) if self.pre_process else None
        hidden = self.decode(embeddings, stream)
        if not self.post_process:
            return hidden
        return self.loss_rows(hidden, batch.rows(start, stop).source)

    def embed(self, batch: PackedBatch, start: int, stop: int) -> Tensor:
        """Token embeddings [t, H] with the image features and row separators scattered in."""
        embeddings = self.embed_tokens(batch.tokens[start:stop])
        features = self.embed_images(batch.patches, batch.image_grid, batch.cu_patches)
        return scatter_vision(embeddings, features, vision_rows(batch.vision_index[start:stop], features))

    def embed_images(self, patches: Tensor, image_grid: Tensor, cu_patches: Tensor) -> Tensor:
        """[P + 1, H]: projected patches, and the row separator last.

        A stream without images runs the tower on one blank patch, whose feature goes nowhere, so that every rank takes
        part in the tower's collectives and every parameter has a gradient.
        """
        if not len(patches):
            patches = patches.new_zeros(1, self.shape.patch_dim)
            image_grid = image_grid.new_ones(1, 3)
            cu_patches = torch.tensor([0, 1], dtype=torch.int32, device=patches.device)
        features = self.projector(self.vision(patches, image_grid, cu_patches))
        return torch.cat([features, self.image_newline[None]])


def vision_rows(vision_index: Tensor, features: Tensor) -> Tensor:
    """`scatter_vision`'s index: row separators (-2) point at the last feature row."""
    return torch.where(vision_index == PackedBatch.NEWLINE_INDEX, features.shape[0] - 1, vision_index)


def build_model(model: ModelConfig, parallel: ParallelConfig, seed: int, chunk: int = 0) -> R4BModel:
    """This rank's stage (chunk of it) with initial weights that do not depend on the layout."""
    config = resolve(model)
    built = R4BModel(config, parallel, model.dtype, chunk)
    init_weights(built, seed, config.init_std, config.num_layers)
    return built
