"""The decoder straight on the Megatron model's parameters, for prompts and for decode steps.

A step moves one token per request through the decoder, where the number of calls, not arithmetic, is the time; so the
layers' parameters are used directly instead of calling Megatron's modules, and what stands between a layer's two
projections is one op. A test holds the two to 1e-4. Sequence parallelism is not used: there is nothing to keep for a
backward pass.

Shapes: n tokens (of prompts, or one per row), H hidden, Hq/Hk heads of this rank, s = Hq / Hk, D head dim, F image
features, K DeepStack layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.qwen3_vl.model import Qwen3VLModel
from r4b_core.models.r4b.model import R4BModel, vision_rows
from r4b_core.rollout.cache import Attention
from r4b_kernels import dispatch, scatter_vision


@dataclass(frozen=True)
class DeepStack:
    """Features [K, F, H] to add behind the first K layers, at the tokens that ``index`` int64 [n] gives a feature."""

    features: Tensor
    index: Tensor


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
    """The decoder layers of this pipeline stage, or of one chunk of it, reading the model's parameters in place."""

    def __init__(self, model: DecoderModel, first: int = 0) -> None:
        """``first`` is the local number of the first layer: how many there are in this rank's earlier chunks."""
        self.config, self.first = model.config, first
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

    def __call__(self, hidden: Tensor, attention: Attention, stack: DeepStack | None = None) -> Tensor:
        """hidden [n, H] -> [n, H], after the final norm on the last stage.

        ``stack`` is given with prompts that have images, to the stage that begins with the model's first layer.
        """
        stacked = 0 if stack is None else len(stack.features)
        for index, layer in enumerate(self.layers):
            mixed = F.linear(self._norm(hidden, layer.input_norm), layer.qkv).view(len(hidden), *self.mixed)
            out = attention.attend(self.first + index, mixed, layer.q_norm, layer.k_norm)
            hidden = self._add(hidden, out, layer.proj)
            gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            hidden = self._add(hidden, F.silu(gate).mul_(up), layer.down)
            if index < stacked:
                hidden = scatter_vision(hidden, stack.features[index], stack.index, accumulate=True)  # type: ignore[union-attr]
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


def embed_prompts(
    model: DecoderModel, prompts: Sequence[EncodedPrompt], device: torch.device
) -> tuple[Tensor, DeepStack | None]:
    """Decoder inputs [n, H] of prompts one after the other, with their images, and what goes behind the first layers.

    Raises:
        ValueError: for a model of a family that is not known here.
    """
    tokens = torch.cat([prompt.tokens for prompt in prompts]).to(device)
    patches = torch.cat([prompt.patches for prompt in prompts]).to(device)
    grid = torch.cat([prompt.image_grid for prompt in prompts]).to(device)
    first_patch, indices = 0, []
    for prompt in prompts:
        index = prompt.vision_index
        indices.append(torch.where(index >= 0, index + first_patch, index))
        first_patch += len(prompt.patches)
    vision_index = torch.cat(indices).to(device)
    cu_patches = F.pad(grid.prod(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    embeddings = model.embed_tokens(tokens)
    if not len(patches):
        return embeddings, None
    if isinstance(model, R4BModel):
        features = model.embed_images(patches, grid, cu_patches)
        return scatter_vision(embeddings, features, vision_rows(vision_index, features)), None
    if isinstance(model, Qwen3VLModel):
        features, stacked = model.embed_images(patches, grid, cu_patches)
        index = model.feature_index(vision_index)
        return scatter_vision(embeddings, features, index), DeepStack(stacked, index)
    raise ValueError(f"model: rollouts of {type(model).__name__} are not known; take R4BModel or Qwen3VLModel")
