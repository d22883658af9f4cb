"""Megatron-Core layers whose attention, norms and activations are r4b_kernels: shared by both families.

Shapes: t tokens on this rank, B = 1 (Megatron's batch dimension), H hidden, F MLP width, Hq/Hk heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from r4b_core.models.recompute import again, recomputing
from r4b_core.models.streams import Stream
from r4b_core.parallel.device import device
from r4b_kernels import qk_norm_mrope, rms_norm, swiglu

_MLP_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


@dataclass
class LayerConfig(TransformerConfig):
    """TransformerConfig plus selective recomputation as `recompute` means it."""

    recompute_cheap: bool = False


@dataclass
class DecoderConfig(LayerConfig):
    """LayerConfig plus what Qwen3 decoders need of rope."""

    rope_theta: float = 1e6
    mrope_sections: list[int] | None = None
    mrope_interleaved: bool = False


class RMSNorm(nn.Module):
    """RMSNorm [..., H] that tells Megatron to sum its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return again(rms_norm, x, self.weight, eps=self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm [..., H] of the vision tower (never sequence parallel)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device())

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return again(F.layer_norm, x, normalized_shape=shape, weight=self.weight, bias=self.bias, eps=self.eps)


class DecoderAttention(SelfAttention):
    """Self-attention with per-head q/k norm and M-RoPE; what it attends to comes with the Stream."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Stream,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = split_qkv(self, hidden_states)
        query, key = again(
            qk_norm_mrope,
            query,
            key,
            self.q_layernorm.weight,
            self.k_layernorm.weight,
            packed_seq_params.position_ids,
            theta=self.config.rope_theta,
            sections=self.config.mrope_sections,
            interleaved=self.config.mrope_interleaved,
            eps=self.config.layernorm_epsilon,
        )
        out = packed_seq_params.attend(self.layer_number, query, key, value)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))


class VisionAttention(SelfAttention):
    """Bidirectional self-attention of the vision tower, without rope (SigLIP)."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Stream,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = split_qkv(self, hidden_states)
        out = packed_seq_params.attend(self.layer_number, query, key, value)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))


def split_qkv(attention: SelfAttention, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project [t, 1, H] (this rank's share under sequence parallelism) to q [T, Hq, D] and k, v [T, Hk, D].

    Megatron lays the joint projection out by KV group: the group's queries, its key, its value.
    """
    mixed, _ = attention.linear_qkv(hidden_states)
    groups = attention.num_query_groups_per_partition
    per_group = attention.num_attention_heads_per_partition // groups
    dim = attention.hidden_size_per_attention_head
    mixed = mixed.view(mixed.shape[0], groups, per_group + 2, dim)
    query, key, value = mixed.split([per_group, 1, 1], dim=2)
    tokens = mixed.shape[0]
    query, key, value = (x.reshape(tokens, -1, dim) for x in (query, key, value))
    if groups > 1 and per_group > 1:
        # The queries had to be copied: views of the joint projection would keep it for the backward beside the copy.
        key, value = key.contiguous(), value.contiguous()
    return query, key, value


class GatedMLP(MLP):
    """SwiGLU MLP; a spec names the class itself, since Megatron warns of a ModuleSpec with an MLP it does not know."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config,
            _MLP_LINEARS,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: object) -> tuple:  # type: ignore[override]
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(again(swiglu, gate_up))


class VisionMLP(MLP):
    """MLP of the vision tower, with biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config,
            _MLP_LINEARS,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: object) -> tuple:  # type: ignore[override]
        inner, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(again(self.activation_func, inner + bias))


class Layer(TransformerLayer):
    """Megatron's layer, whose cheap parts are computed again in the backward pass where the configuration says so."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.config.recompute_cheap and self.training and torch.is_grad_enabled():
            with recomputing():
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def _layer_spec(
    attention: type,
    mlp: type,
    norm: type,
    qk_norm: type | None,
    layer: type[Layer] = Layer,
) -> ModuleSpec:
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=IdentityOp,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_spec(num_layers: int, layer: type[Layer] = Layer) -> TransformerBlockSubmodules:
    """Pre-norm Qwen3 blocks: RMSNorm, q/k norm, GQA, SwiGLU. ``layer`` may do more than `Layer`."""
    spec = _layer_spec(DecoderAttention, GatedMLP, RMSNorm, RMSNorm, layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def vision_spec(num_layers: int) -> TransformerBlockSubmodules:
    """Pre-norm ViT blocks: LayerNorm, biases, GELU MLP."""
    layer = _layer_spec(VisionAttention, VisionMLP, LayerNorm, None)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LayerNorm)
