"""The R-4B model on Megatron-Core: one pipeline stage of it.

Shapes: T tokens of the stream, t = T / cp of this rank, R loss rows of this rank, H hidden, P patches.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.models.init import init_weights
from r4b_core.models.layers import DecoderConfig, decoder_spec
from r4b_core.models.r4b.config import R4BConfig, decoder_settings, resolve
from r4b_core.models.r4b.vision import Projector, VisionTower
from r4b_core.models.streams import PackedStream, Stream, context_chunk
from r4b_core.parallel.device import device
from r4b_kernels import scatter_vision


class R4BModel(LanguageModule):
    """ViT and projector on the first stage, decoder layers over all, final norm and head weight on the last."""

    def __init__(self, config: R4BConfig, parallel: ParallelConfig, dtype: str) -> None:
        super().__init__(config=DecoderConfig(**decoder_settings(config, parallel, dtype)))
        self.shape = config
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.share_embeddings_and_output_weights = config.tie_embeddings
        if self.pre_process:
            self.vision = VisionTower(config, parallel, dtype)
            self.projector = Projector(config, parallel, dtype)
            self.image_newline = nn.Parameter(
                torch.empty(config.hidden_size, dtype=self.config.params_dtype, device=device())
            )
            # Images are scattered into the whole stream, so sequence parallelism splits it only afterwards.
            self.embedding = LanguageModelEmbedding(
                self.config, config.vocab_size, 0, position_embedding_type="rope", scatter_to_sequence_parallel=False
            )
        self.decoder = TransformerBlock(
            self.config,
            decoder_spec(config.num_layers // parallel.pp),
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                config.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and config.tie_embeddings,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron's schedules hand the previous stage's output over here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

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
        return hidden.index_select(0, batch.rows(start, stop).source)

    def decode(self, embeddings: Tensor | None, stream: Stream) -> Tensor:
        """Decoder layers; [t, H] after the final norm on the last stage, else [t or its share, 1, H]."""
        if embeddings is not None:
            embeddings = embeddings.unsqueeze(1)
            if self.config.sequence_parallel:
                embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        hidden = self.decoder(embeddings, None, packed_seq_params=stream)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The head returns the whole gradient on every rank, so the gather's backward only splits it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def embed(self, batch: PackedBatch, start: int, stop: int) -> Tensor:
        """Token embeddings [t, H] with the image features and row separators scattered in."""
        embeddings = self.embed_tokens(batch.tokens[start:stop])
        features = self.embed_images(batch.patches, batch.image_grid, batch.cu_patches)
        return scatter_vision(embeddings, features, vision_rows(batch.vision_index[start:stop], features))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens.unsqueeze(0), None).squeeze(1)

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

    def head_weight(self) -> Tensor:
        """This rank's shard [V / tp, H] of the head (the embedding table where tied); last stage only."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def head_group(self) -> torch.distributed.ProcessGroup | None:
        """The group over which the vocabulary is split, or None."""
        return self.tp_group if self.tp_group.size() > 1 else None


def vision_rows(vision_index: Tensor, features: Tensor) -> Tensor:
    """`scatter_vision`'s index: row separators (-2) point at the last feature row."""
    return torch.where(vision_index == PackedBatch.NEWLINE_INDEX, features.shape[0] - 1, vision_index)


def build_model(model: ModelConfig, parallel: ParallelConfig, seed: int) -> R4BModel:
    """This rank's stage with initial weights that do not depend on the layout."""
    config = resolve(model)
    built = R4BModel(config, parallel, model.dtype)
    init_weights(built, seed, config.init_std, config.num_layers)
    return built
