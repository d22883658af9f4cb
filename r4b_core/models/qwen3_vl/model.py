"""The Qwen3-VL model on Megatron-Core: one pipeline stage of it, or one chunk of a stage.

Shapes: T tokens of the stream, t = T / cp of this rank, R loss rows of this rank, H hidden, P patches, F features,
K DeepStack layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.init import init_weights
from r4b_core.models.layers import DecoderConfig, Layer
from r4b_core.models.qwen3_vl.config import Qwen3VLConfig, decoder_settings, resolve
from r4b_core.models.qwen3_vl.vision import VisionTower
from r4b_core.models.streams import PackedStream, context_chunk
from r4b_kernels import scatter_vision


@dataclass
class DeepStackStream(PackedStream):
    """A PackedStream that knows which feature stands at which of this rank's tokens.

    Attributes:
        feature_index: int64 [t or this rank's share under sequence parallelism], -1 for text; None off the first stage.
    """

    feature_index: Tensor | None = None


class DeepStackLayer(Layer):
    """A decoder layer that, being one of the first K, adds its visual features to what it returns.

    The features [K, F, H] come as Megatron's ``context``, which reaches every layer, recomputed ones too.
    """

    def forward(self, *args: Any, packed_seq_params: DeepStackStream, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, features = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        if features is not None and self.layer_number <= len(features):
            index = packed_seq_params.feature_index
            hidden = scatter_vision(hidden.squeeze(1), features[self.layer_number - 1], index, accumulate=True)
            # A pipeline frees what a stage has sent, which must not be a view.
            hidden = make_viewless_tensor(hidden.unsqueeze(1), hidden.requires_grad, keep_graph=True)
        return hidden, features


class Qwen3VLModel(DecoderModel):
    """Vision tower and DeepStack on the first stage, decoder layers over all, final norm and head on the last."""

    def __init__(self, config: Qwen3VLConfig, parallel: ParallelConfig, dtype: str, chunk: int = 0) -> None:
        super().__init__(DecoderConfig(**decoder_settings(config, parallel, dtype)), config.tie_embeddings, chunk)
        self.shape = config
        if self.pre_process:
            self.vision = VisionTower(config, parallel, dtype)
        self.build_decoder(config.vocab_size, DeepStackLayer)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [R, H] of this rank's loss rows on the last stage, the stream [t, 1, H] on others."""
        start, stop = context_chunk(batch.num_tokens, self.cp_group)
        stream = DeepStackStream(
            layout=batch.layout, position_ids=batch.position_ids[:, start:stop], context_group=self.cp_group
        )
        embeddings = stack = None
        if self.pre_process:
            features, stack = self.embed_images(batch.patches, batch.image_grid, batch.cu_patches)
            index = self.feature_index(batch.vision_index[start:stop])
            embeddings = scatter_vision(self.embed_tokens(batch.tokens[start:stop]), features, index)
            stream.feature_index = index
            if self.config.sequence_parallel:
                # Each rank adds to its share of the tokens, so the gradients of the features are summed over the ranks.
                stack = tensor_parallel.copy_to_tensor_model_parallel_region(stack)
                stream.feature_index = index.chunk(self.tp_group.size())[self.tp_group.rank()]
        hidden = self.decode(embeddings, stream, stack)
        if not self.post_process:
            return hidden
        return self.loss_rows(hidden, batch.rows(start, stop).source)

    def embed_images(self, patches: Tensor, image_grid: Tensor, cu_patches: Tensor) -> tuple[Tensor, Tensor]:
        """Features [F, H] that replace image tokens' embeddings, and DeepStack's [K, F, H].

        A stream without images runs the tower on one blank block, whose features go nowhere, so that every rank takes
        part in the tower's collectives and every parameter has a gradient.
        """
        if not len(patches):
            merge = self.shape.merge_size
            patches = patches.new_zeros(merge**2, self.shape.patch_dim)
            image_grid = torch.tensor([[1, merge, merge]], device=patches.device)
            cu_patches = torch.tensor([0, merge**2], dtype=torch.int32, device=patches.device)
        return self.vision(patches, image_grid, cu_patches)

    def feature_index(self, vision_index: Tensor) -> Tensor:
        """`scatter_vision`'s index: each block's first patch becomes its feature; marks (-1 for text) stay."""
        return torch.where(vision_index >= 0, vision_index // self.shape.merge_size**2, vision_index)


def build_model(model: ModelConfig, parallel: ParallelConfig, seed: int, chunk: int = 0) -> Qwen3VLModel:
    """This rank's stage (chunk of it) with initial weights that do not depend on the layout."""
    config = resolve(model)
    built = Qwen3VLModel(config, parallel, model.dtype, chunk)
    init_weights(built, seed, config.init_std, config.num_layers)
    return built
