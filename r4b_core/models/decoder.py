"""The decoder around Megatron-Core's blocks: embedding, layers, final norm and head, one chunk of it.

A pipeline rank holds one chunk, or `virtual_stages` of them (interleaved 1F1B): with two ranks and two chunks each, the
layers lie, in order, on rank 0, rank 1, rank 0, rank 1. What is said of the first and last stage is of those chunks.

Shapes: T tokens of the stream, t = T / cp of this rank, H hidden, V vocabulary.
"""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.distributed import ProcessGroup

from r4b_core.models.layers import DecoderConfig, Layer, decoder_spec
from r4b_core.models.recompute import recomputes_fully, with_gradient
from r4b_core.models.streams import Stream


class DecoderModel(LanguageModule):
    """Token embedding on the first stage, decoder layers over all, final norm and head weight on the last.

    A family adds its eyes between the constructor and `build_decoder`: gradient buckets follow the order in which
    modules are added, which should be that of the forward pass.
    """

    def __init__(self, settings: DecoderConfig, tie_embeddings: bool, chunk: int = 0) -> None:
        """``settings`` are the decoder's, with the layers of all stages; a tied head is the embedding table.

        ``chunk`` counts this rank's chunks from 0.
        """
        super().__init__(config=settings)
        chunks = settings.virtual_pipeline_model_parallel_size
        self.vp_stage = chunk if chunks is not None else None
        self.pre_process = parallel_state.is_pipeline_first_stage() and chunk == 0
        self.post_process = parallel_state.is_pipeline_last_stage() and chunk == (chunks or 1) - 1
        self.share_embeddings_and_output_weights = tie_embeddings

    def build_decoder(self, vocab_size: int, layer: type[Layer] = Layer) -> None:
        """Add this stage's part of embedding, layers (of class ``layer``), final norm and head."""
        settings = self.config
        stages = settings.pipeline_model_parallel_size * (settings.virtual_pipeline_model_parallel_size or 1)
        if self.pre_process:
            # Images are scattered into the whole stream, so sequence parallelism splits it only afterwards.
            self.embedding = LanguageModelEmbedding(
                settings, vocab_size, 0, position_embedding_type="rope", scatter_to_sequence_parallel=False
            )
        self.decoder = TransformerBlock(
            settings,
            decoder_spec(settings.num_layers // stages, layer),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                settings.hidden_size,
                vocab_size,
                config=settings,
                init_method=settings.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron's schedules hand the previous stage's output over here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """[t, H] of int64 [t]; first stage only."""
        return self.embedding(tokens.unsqueeze(0), None).squeeze(1)

    def decode(self, embeddings: Tensor | None, stream: Stream, context: Tensor | None = None) -> Tensor:
        """Decoder layers; [t, H] after the final norm on the last stage, else [t or its share, 1, H].

        Every layer is given ``context``, a tensor whose gradient survives recomputation of the layers.
        """
        if embeddings is not None:
            if recomputes_fully(self, self.config):
                embeddings = with_gradient(embeddings, self.decoder)
            embeddings = embeddings.unsqueeze(1)
            if self.config.sequence_parallel:
                embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        hidden = self.decoder(embeddings, None, context=context, packed_seq_params=stream)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The head returns the whole gradient on every rank, so the gather's backward only splits it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    @staticmethod
    def loss_rows(hidden: Tensor, source: Tensor) -> Tensor:
        """[R, H]: the rows ``source`` [R] of [t, H]; a prompt's last row may be asked for many times.

        On a GPU the gradients of such a row are added by indexing's backward, which sorts, and not by that of
        ``index_select``, whose atomic additions come in another order each time.
        """
        return hidden.index_select(0, source) if hidden.device.type == "cpu" else hidden[source]

    def head_weight(self) -> Tensor:
        """This rank's shard [V / tp, H] of the head (the embedding table where tied); last stage only."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def head_group(self) -> ProcessGroup | None:
        """The group over which the vocabulary is split, or None."""
        return self.tp_group if self.tp_group.size() > 1 else None
