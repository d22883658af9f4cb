"""One decode step straight on the Megatron model's parameters.

A step moves one token per request through the decoder, where Python's overhead, not arithmetic, is the time; so the
layers' parameters are used directly instead of calling Megatron's modules. A test holds the two to 1e-4.

Shapes: N active requests, H hidden, Hq/Hk heads of this rank, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from r4b_core.models.layers import DecoderAttention, DecoderConfig
from r4b_core.rollout.cache import ResponseCache


class DecodeLayers:
    """The decoder layers of this pipeline stage, reading the model's parameters in place."""

    def __init__(self, layers: torch.nn.ModuleList, config: DecoderConfig, tp_group: ProcessGroup) -> None:
        self.layers = layers
        self.config = config
        self.tp_group = tp_group if tp_group.size() > 1 else None
        self.rope = _RopeTable(config.kv_channels, config.rope_theta)

    def __call__(self, hidden: Tensor, position: Tensor, cache: ResponseCache) -> Tensor:
        """hidden [N, H] at positions int64 [N] -> [N, H], before the final norm."""
        eps = self.config.layernorm_epsilon
        cos, sin = self.rope(position, hidden.dtype)
        for index, layer in enumerate(self.layers):
            attention: DecoderAttention = layer.self_attention
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_layernorm.weight, eps)
            query, key, value = self._qkv(attention, normed)
            query = _rotate(F.rms_norm(query, query.shape[-1:], attention.q_layernorm.weight, eps), cos, sin)
            key = _rotate(F.rms_norm(key, key.shape[-1:], attention.k_layernorm.weight, eps), cos, sin)
            out = cache.attend(index, query, key, value)
            hidden = hidden + self._reduced(F.linear(out.flatten(1), attention.linear_proj.weight))
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.pre_mlp_layernorm.weight, eps)
            gate, up = F.linear(normed, layer.mlp.linear_fc1.weight).chunk(2, dim=-1)
            hidden = hidden + self._reduced(F.linear(F.silu(gate) * up, layer.mlp.linear_fc2.weight))
        return hidden

    def _qkv(self, attention: DecoderAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = attention.num_query_groups_per_partition
        per_group = attention.num_attention_heads_per_partition // groups
        dim = attention.hidden_size_per_attention_head
        mixed = F.linear(normed, attention.linear_qkv.weight).view(len(normed), groups, per_group + 2, dim)
        query = mixed[:, :, :per_group].reshape(len(normed), -1, dim)
        return query, mixed[:, :, per_group], mixed[:, :, per_group + 1]

    def _reduced(self, partial: Tensor) -> Tensor:
        if self.tp_group is not None:
            torch.distributed.all_reduce(partial, group=self.tp_group)
        return partial


class _RopeTable:
    """cos and sin [positions, 1, D/2], grown on demand. A response token has one position on all three axes."""

    def __init__(self, dim: int, theta: float) -> None:
        self.frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.cos = self.sin = torch.empty(0, 1, dim // 2)

    def __call__(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        needed = int(position.max()) + 1
        if needed > len(self.cos):
            angle = torch.arange(2 * needed, dtype=torch.float64)[:, None] * self.frequency
            self.cos, self.sin = (f(angle).float()[:, None, :].to(position.device) for f in (torch.cos, torch.sin))
        return self.cos[position].to(dtype), self.sin[position].to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half rope of x [N, H, D] by cos, sin [N, 1, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
