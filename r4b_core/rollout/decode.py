"""One decode step straight on the Megatron model's parameters.

A step moves one token per request through the decoder, where the number of calls, not arithmetic, is the time; so the
layers' parameters are used directly instead of calling Megatron's modules, and factors are folded into small tables. A
test holds the two to 1e-4.

Shapes: N rows, H hidden, Hq/Hk heads of this rank, s = Hq / Hk, D head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_core.models.r4b.model import R4BModel
from r4b_core.rollout.cache import ResponseCache


class _Layer(NamedTuple):
    """A layer's parameters: views of the model's matrices, and small copies of its norms with factors folded in."""

    input_norm: Tensor
    qkv: Tensor  # [Hk, H, (s + 2) * D]
    qk_norm: Tensor  # [s + 1, D]: the queries' (with the softmax scale), then the key's
    proj: Tensor  # [Hq * D, H]
    mlp_norm: Tensor
    gate_up: Tensor  # [2F, H]
    down: Tensor  # [F, H]


class DecodeLayers:
    """The decoder layers of this pipeline stage, reading the model's matrices in place.

    Made for one `generate`: norms are copied, so an update of the weights needs another one.
    """

    def __init__(self, model: R4BModel, positions: int) -> None:
        """``positions``: tokens have positions below it."""
        self.config = config = model.config
        self.tp_group = model.tp_group if model.tp_group.size() > 1 else None
        dtype = model.decoder.layers[0].input_layernorm.weight.dtype
        self.norm = RowNorm(config.hidden_size, config.layernorm_epsilon, dtype)
        self.head_norm = RowNorm(config.kv_channels, config.layernorm_epsilon, dtype)
        self.layers = [self._layer(layer) for layer in model.decoder.layers]
        self.final_norm = self.norm.weight(model.decoder.final_layernorm.weight) if model.post_process else None
        self.rope = _rope_table(config.kv_channels, config.rope_theta, positions, dtype)

    def _layer(self, layer: torch.nn.Module) -> _Layer:
        attention = layer.self_attention
        heads = attention.num_query_groups_per_partition
        dim = attention.hidden_size_per_attention_head
        share = attention.num_attention_heads_per_partition // heads
        query = self.head_norm.weight(attention.q_layernorm.weight) * dim**-0.5
        key = self.head_norm.weight(attention.k_layernorm.weight)
        qkv = attention.linear_qkv.weight
        return _Layer(
            self.norm.weight(layer.input_layernorm.weight),
            qkv.view(heads, (share + 2) * dim, qkv.shape[1]).transpose(1, 2),
            torch.stack([query] * share + [key]),
            attention.linear_proj.weight.t(),
            self.norm.weight(layer.pre_mlp_layernorm.weight),
            layer.mlp.linear_fc1.weight,
            layer.mlp.linear_fc2.weight.t(),
        )

    def __call__(self, hidden: Tensor, position: Tensor, cache: ResponseCache) -> Tensor:
        """hidden [N, H] at positions int64 [N] -> [N, H], before the final norm."""
        rows, dim = len(hidden), self.config.kv_channels
        cos, sin = self.rope.index_select(1, position).unbind()
        for index, layer in enumerate(self.layers):
            normed = self.norm(hidden, layer.input_norm)
            heads = len(layer.qkv)
            mixed = torch.bmm(normed.expand(heads, -1, -1), layer.qkv).view(heads, rows, -1, dim)
            share = mixed.shape[2] - 2
            turned = self.head_norm(mixed.narrow(2, 0, share + 1), layer.qk_norm)
            turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin)
            out = cache.attend(index, turned.narrow(2, 0, share), turned.select(2, share), mixed.select(2, share + 1))
            hidden = self._add(hidden, out.transpose(0, 1).reshape(rows, -1), layer.proj)
            gate, up = F.linear(self.norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = self._add(hidden, F.silu(gate).mul_(up), layer.down)
        return hidden

    def _add(self, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """hidden + x weight, summed over tensor-parallel ranks."""
        if self.tp_group is None:
            return torch.addmm(hidden, x, weight)
        partial = x @ weight
        torch.distributed.all_reduce(partial, group=self.tp_group)
        return hidden + partial


class RowNorm:
    """RMSNorm in the fewest calls: x / sqrt(|x|^2 + n eps) times the weight, which `weight` has multiplied by sqrt(n).

    Half precision takes torch's own RMSNorm, whose sums are in float32.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        self.size, self.eps = size, eps
        self.floor = torch.tensor(math.sqrt(size * eps), dtype=torch.float64)
        self.half = dtype.itemsize < 4

    def weight(self, weight: Tensor) -> Tensor:
        return weight if self.half else weight * math.sqrt(self.size)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.half:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * weight
        return x.div(torch.linalg.vector_norm(x, 2, -1, True).hypot_(self.floor)).mul_(weight)


def _rope_table(dim: int, theta: float, positions: int, dtype: torch.dtype) -> Tensor:
    """[2, positions, 1, D], factors of x and of x rolled by D/2; a response token has one position on all axes."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])[:, :, None].to(dtype)
