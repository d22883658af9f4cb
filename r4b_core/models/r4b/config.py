"""Shapes of the R-4B family, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from r4b_core.config.recipe import ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": dict(recompute_cheap=True),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


@dataclass(frozen=True)
class R4BConfig:
    """One size. Vision fields are the ViT's, the rest the decoder's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    init_std: float
    patch_size: int
    vision_num_layers: int
    vision_hidden_size: int
    vision_ffn_hidden_size: int
    vision_num_heads: int
    vision_grid: tuple[int, int]
    tie_embeddings: bool = True
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Values of one RGB patch."""
        return 3 * self.patch_size**2

    @property
    def parts(self) -> tuple[str, ...]:
        """The first parts of all parameters' names."""
        head = () if self.tie_embeddings else ("output_layer",)
        return ("vision", "projector", "image_newline", "embedding", "decoder", *head)


SIZES = {
    "toy": R4BConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=64,
        rope_theta=1e4,
        init_std=0.08,
        patch_size=16,
        vision_num_layers=1,
        vision_hidden_size=64,
        vision_ffn_hidden_size=256,
        vision_num_heads=2,
        vision_grid=(3, 4),
    ),
    "4b": R4BConfig(
        num_layers=36,
        hidden_size=2560,
        ffn_hidden_size=9728,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1e6,
        init_std=0.02,
        patch_size=14,
        vision_num_layers=26,
        vision_hidden_size=1152,
        vision_ffn_hidden_size=4304,
        vision_num_heads=16,
        vision_grid=(27, 27),
    ),
}


def resolve(model: ModelConfig) -> R4BConfig:
    """The named size with the recipe's overrides.

    Raises:
        ValueError: unknown size or shape field, naming what there is.
    """
    if model.size not in SIZES:
        raise ValueError(f"model.size: {model.size!r} is not a size of r4b; there are {', '.join(SIZES)}")
    fields = {field.name for field in dataclasses.fields(R4BConfig)}
    if unknown := sorted(set(model.shape) - fields):
        raise ValueError(f"model.shape: unknown field(s) {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    return dataclasses.replace(SIZES[model.size], **model.shape)


def transformer_settings(parallel: ParallelConfig, dtype: str) -> dict[str, Any]:
    """TransformerConfig fields that the vision tower and the decoder share."""
    params_dtype = DTYPES[dtype]
    return dict(
        tensor_model_parallel_size=parallel.tp,
        params_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        # Megatron marks how a weight is cut over tensor-parallel ranks only where it initializes it.
        perform_initialization=True,
        init_method=_leave_to_init_weights,
        output_layer_init_method=_leave_to_init_weights,
        embedding_init_method=_leave_to_init_weights,
        calculate_per_token_loss=True,
        **RECOMPUTE[parallel.recompute],
    )


def decoder_settings(config: R4BConfig, parallel: ParallelConfig, dtype: str) -> dict[str, Any]:
    return dict(
        transformer_settings(parallel, dtype),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        rope_theta=config.rope_theta,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        pipeline_dtype=DTYPES[dtype],
        moe_token_dispatcher_type="alltoall",
        variable_seq_lengths=parallel.pp > 1,
        **(_interleaved(parallel.virtual_stages) if parallel.virtual_stages > 1 else {}),
    )


def _interleaved(virtual_stages: int) -> dict[str, Any]:
    """Two messages between the same two ranks in one batch are taken for each other: forward and backward go apart."""
    return dict(virtual_pipeline_model_parallel_size=virtual_stages, overlap_p2p_comm=True, batch_p2p_comm=False)


def vision_settings(config: R4BConfig, parallel: ParallelConfig, dtype: str) -> dict[str, Any]:
    """The tower runs whole on the first stage, split over tensor-parallel ranks only."""
    return dict(
        transformer_settings(parallel, dtype),
        num_layers=config.vision_num_layers,
        hidden_size=config.vision_hidden_size,
        ffn_hidden_size=config.vision_ffn_hidden_size,
        num_attention_heads=config.vision_num_heads,
        kv_channels=config.vision_hidden_size // config.vision_num_heads,
        layernorm_epsilon=1e-6,
        normalization="LayerNorm",
        gated_linear_unit=False,
        activation_func=_gelu_tanh,
        add_bias_linear=True,
    )


def _leave_to_init_weights(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")
