"""A tiny decoder on Megatron-Core's layers for tests: embedding, two blocks, head, and a "vision" part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

VOCAB, HIDDEN = 48, 32


@dataclass
class ToyBatch:
    tokens: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


class ToyNorm(torch.nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ToyCoreAttention(torch.nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def toy_config(layout: Any, **overrides: Any) -> TransformerConfig:
    return TransformerConfig(
        **{
            **dict(
                num_layers=2,
                hidden_size=HIDDEN,
                num_attention_heads=4,
                num_query_groups=2,
                ffn_hidden_size=64,
                gated_linear_unit=True,
                activation_func=torch.nn.functional.silu,
                add_bias_linear=False,
                qk_layernorm=True,
                normalization="RMSNorm",
                hidden_dropout=0.0,
                attention_dropout=0.0,
                bias_dropout_fusion=False,
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                sequence_parallel=layout.sequence_parallel,
                pipeline_dtype=torch.float32,
                gradient_accumulation_fusion=False,
            ),
            **overrides,
        }
    )


def _layer_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ToyCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=ToyNorm,
            k_layernorm=ToyNorm,
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ToyNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            cross_attention=IdentityOp,
            pre_mlp_layernorm=ToyNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class ToyModel(MegatronModule):
    """``model(batch)`` -> logits [T, 1, V / tp] on the last stage, else the hidden stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        self.share_embeddings_and_output_weights = False
        if self.pre_process:
            self.embedding = VocabParallelEmbedding(
                VOCAB, HIDDEN, init_method=config.init_method, config=config, reduce_scatter_embeddings=False
            )
            self.vision = torch.nn.Linear(4, HIDDEN, dtype=config.params_dtype)
        spec = _layer_spec()
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                layer_specs=[spec] * (config.num_layers // config.pipeline_model_parallel_size), layer_norm=ToyNorm
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        if self.post_process:
            self.head = ColumnParallelLinear(
                HIDDEN, VOCAB, config=config, init_method=config.init_method, bias=False, gather_output=False
            )

    def set_input_tensor(self, tensor: list[Tensor]) -> None:
        self.decoder.set_input_tensor(tensor[0])

    def forward(self, batch: ToyBatch) -> Tensor:
        hidden = None
        if self.pre_process:
            features = torch.stack([batch.tokens * factor % 7 / 7.0 for factor in (1, 2, 3, 5)], dim=-1)
            hidden = self.embedding(batch.tokens[:, None]) + self.vision(features.to(self.vision.weight.dtype))[:, None]
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(hidden, attention_mask=None)
        return self.head(hidden)[0] if self.post_process else hidden


def toy_loss(model: ToyModel, batch: ToyBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), batch.targets[:, None])[:, 0]
    return (losses * batch.weights).sum(), batch.weights.sum(), {"tokens": torch.tensor(float(batch.num_tokens))}


def toy_batches(count: int, seed: int = 0, lengths: tuple[int, ...] = (16, 24)) -> list[ToyBatch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        tokens = torch.randint(0, VOCAB, (lengths[index % len(lengths)] + 1,), generator=generator)
        weights = torch.rand(tokens.numel() - 1, generator=generator)
        batches.append(ToyBatch(tokens[:-1], tokens[1:], weights))
    return batches


def build_toy(layout: Any, **overrides: Any) -> ToyModel:
    return ToyModel(toy_config(layout, **overrides))
