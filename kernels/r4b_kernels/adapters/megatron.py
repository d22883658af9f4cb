"""Core attention and loss head for Megatron-Core (0.16).

    from r4b_kernels.adapters import megatron

    spec = megatron.with_prefix_attention(get_gpt_layer_local_spec(...))
    model = GPTModel(config, spec, ..., position_embedding_type="mrope")
    megatron.use_linear_logprob(model)
    packed = megatron.packed_seq_params(layout)
    loss = model(tokens, position_ids, None, labels=labels, packed_seq_params=packed)        # [1, T], no logits
    hidden = model(tokens, position_ids, None, packed_seq_params=packed)                     # [1, T, H]
    weight, group = megatron.head(model)
    policy_loss_head(hidden[0], weight, ..., group=group).loss.backward()

Responses go on counting where their prompt ended, so positions must come from ``position_ids`` [3, 1, T]: "mrope" reads
them (three equal rows are plain rope), "rope" does not. In Megatron's THD format, where every sequence counts from 0,
the attention serves sequences without parents.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_kernels.layout import PrefixLayout
from r4b_kernels.linear_logprob import linear_logprob
from r4b_kernels.prefix_attention import prefix_attention
from r4b_kernels.vision_attention import vision_attention


class PrefixCoreAttention(torch.nn.Module):
    """Takes the place of DotProductAttention: causal with or without packing, or bidirectional (no_mask) for ViTs.

    As in Transformer Engine, a causal type is causal whatever ``attention_mask`` holds. Under tensor parallelism it
    sees this rank's heads.

    Raises:
        ValueError: when built, for what the kernels do not compute: dropout, sliding windows, attention sinks, context
            parallelism, cross-attention, other masks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        refused = {
            "attention_dropout": config.attention_dropout if attention_dropout is None else attention_dropout,
            "window_size": getattr(config, "window_size", None),
            "softmax_type": {"vanilla": None}.get(kind := getattr(config, "softmax_type", "vanilla"), kind),
            "context_parallel_size": config.context_parallel_size - 1 and config.context_parallel_size,
            "attention_type": None if attention_type == "self" else attention_type,
            "attn_mask_type": None if attn_mask_type.name in ("causal", "no_mask") else attn_mask_type.name,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}={value}: PrefixCoreAttention cannot compute it; keep Megatron's own")
        self.causal, self.scale = attn_mask_type.name == "causal", softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[T, H, D] of a THD batch -> [T, 1, H * D], or [T, B, H, D] -> [T, B, H * D]; B is 1 if packed."""
        if attention_bias is not None:
            raise ValueError("attention_bias is set: PrefixCoreAttention has none")
        tokens, batch = query.shape[0], 1 if query.dim() == 3 else query.shape[1]
        if packed_seq_params is not None and batch != 1:
            raise ValueError(f"query has batch size {batch}: a packed stream has 1")
        q, k, v = (x.reshape(tokens, batch, -1, x.shape[-1]).transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        layout = self._layout(packed_seq_params, tokens, batch, q.device)
        if self.causal:
            out = prefix_attention(q, k, v, layout, scale=self.scale)
        else:
            out = vision_attention(q, k, v, layout.offsets, scale=self.scale)
        return out.view(batch, tokens, -1).transpose(0, 1)  # type: ignore[union-attr]

    @staticmethod
    def _layout(packed: Any, tokens: int, batch: int, device: torch.device) -> PrefixLayout:
        layout: PrefixLayout | None = getattr(packed, "prefix_layout", None)
        if layout is not None and packed.qkv_format == "thd":
            raise ValueError("qkv_format='thd' restarts positions in every segment: use packed_seq_params(layout)")
        if layout is not None:
            return layout
        if packed is None:
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        else:
            padded = packed.cu_seqlens_q_padded
            offsets = (packed.cu_seqlens_q if padded is None else padded).int()
        return PrefixLayout(offsets, torch.full_like(offsets[1:], -1))


def with_prefix_attention(spec: Any) -> Any:
    """A copy of a layer's or a block's spec with PrefixCoreAttention in every self-attention."""
    spec = copy.copy(spec)
    if hasattr(spec, "core_attention"):
        spec.core_attention = PrefixCoreAttention
    for name in ("submodules", "self_attention"):
        if getattr(spec, name, None) is not None:
            setattr(spec, name, with_prefix_attention(getattr(spec, name)))
    if getattr(spec, "layer_specs", None) is not None:
        spec.layer_specs = [with_prefix_attention(layer) for layer in spec.layer_specs]
    return spec


def packed_seq_params(layout: PrefixLayout) -> Any:
    """Megatron's PackedSeqParams carrying the layout, in a format that leaves positions to the rotary embedding."""
    from megatron.core.packed_seq_params import PackedSeqParams

    packed: Any = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=layout.offsets, cu_seqlens_kv=layout.offsets)
    packed.prefix_layout = layout
    return packed


def head(model: Any) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's rows of a GPTModel's output weight, tied or not, and the group over which it is cut."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight, model.pg_collection.tp


def use_linear_logprob(model: Any, *, temperature: float = 1.0) -> None:
    """Let a GPTModel return losses [B, T] without logits, and without labels its final hidden states [B, T, H].

    A negative label has the loss 0. Under sequence parallelism the states are gathered. Generation needs the logits:
    call this on models that train.
    """
    if getattr(model.output_layer, "bias", None) is not None or model.config.mtp_num_layers:
        raise ValueError("the output layer has a bias or feeds multi-token prediction: keep Megatron's own loss")

    def hidden_states(self: Any, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather

            # The head's operators give every rank the whole gradient: each takes its part, nothing is summed.
            hidden = gather(hidden, tensor_parallel_output_grad=False, group=model.pg_collection.tp)
        return hidden, None

    def loss(self: Any, labels: Tensor, hidden: Tensor) -> Tensor:
        weight, group = head(self)
        rows, target = hidden.transpose(0, 1).flatten(0, 1), labels.flatten()
        return -linear_logprob(rows, weight, target, temperature=temperature, group=group)[0].view(labels.shape)

    model.output_layer.forward = types.MethodType(hidden_states, model.output_layer)
    model.compute_language_model_loss = types.MethodType(loss, model)
