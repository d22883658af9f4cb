"""The decoder straight on the Megatron model's parameters, for prompts and for decode steps.

A step moves one token per request through the decoder, where the number of calls, not arithmetic, is the time; so the
layers' parameters are used directly instead of calling Megatron's modules, and what stands between a layer's two
projections is one op. A test holds the two to 1e-4. Sequence parallelism is not used: there is nothing to keep for a
backward pass.

Shapes: n tokens (of prompts, or one per row), H hidden, Hq/Hk heads of this rank, s = Hq / Hk, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_core.models.r4b.model import R4BModel
from r4b_core.rollout.cache import Attention
from r4b_kernels import dispatch


class _Layer(NamedTuple):
    """A layer's parameters, which are the model's own."""

    input_norm: Tensor
    qkv: Tensor  # [Hk * (s + 2) * D, H]
    q_norm: Tensor
    k_norm: Tensor
    proj: Tensor  # [Hq * D, H]
    mlp_norm: Tensor
    gate_up: Tensor  # [2F, H]
    down: Tensor  # [F, H]


class DecoderLayers:
    """The decoder layers of this pipeline stage, reading the model's parameters in place."""

    def __init__(self, model: R4BModel) -> None:
        self.config = model.config
        self.tp_group = model.tp_group if model.tp_group.size() > 1 else None
        self.layers = [self._layer(layer) for layer in model.decoder.layers]
        self.final_norm = model.decoder.final_layernorm.weight if model.post_process else None
        weight = self.layers[0].input_norm
        # The op's own implementation, chosen once: a step has no time for its checks.
        self._rms_norm = dispatch.resolve("rms_norm", weight.device, None, weight).forward
        heads, dim = model.decoder.layers[0].self_attention.num_query_groups_per_partition, self.config.kv_channels
        self.mixed = heads, -1, dim

    @staticmethod
    def _layer(layer: torch.nn.Module) -> _Layer:
        attention, mlp = layer.self_attention, layer.mlp
        return _Layer(
            layer.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.q_layernorm.weight,
            attention.k_layernorm.weight,
            attention.linear_proj.weight.t(),
            layer.pre_mlp_layernorm.weight,
            mlp.linear_fc1.weight,
            mlp.linear_fc2.weight.t(),
        )

    def __call__(self, hidden: Tensor, attention: Attention) -> Tensor:
        """hidden [n, H] -> [n, H], after the final norm on the last stage."""
        for index, layer in enumerate(self.layers):
            mixed = F.linear(self._norm(hidden, layer.input_norm), layer.qkv).view(len(hidden), *self.mixed)
            out = attention.attend(index, mixed, layer.q_norm, layer.k_norm)
            hidden = self._add(hidden, out, layer.proj)
            gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = self._add(hidden, F.silu(gate).mul_(up), layer.down)
        return hidden if self.final_norm is None else self._norm(hidden, self.final_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._rms_norm(x, weight, self.config.layernorm_epsilon)[0]

    def _add(self, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """hidden + x weight, summed over tensor-parallel ranks."""
        if self.tp_group is None:
            return torch.addmm(hidden, x, weight)
        partial = x @ weight
        torch.distributed.all_reduce(partial, group=self.tp_group)
        return hidden + partial
