"""prefix_attention and vision_attention as attention implementations of Hugging Face transformers (5.x).

    from r4b_kernels.adapters import huggingface

    huggingface.register()
    model.set_attn_implementation("r4b_prefix")
    model(input_ids=stream, position_ids=positions, prefix_layout=layout)     # stream, positions [1, T]

Models hand keywords they do not know down to their attention, so ``prefix_layout`` arrives by itself. Without it the
segments are those of ``cu_seq_lens_q``, else those that transformers finds: rows of a batch, without their padding, or
position ids that start again (it looks for these only under ``use_cache=False``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from r4b_kernels.layout import PrefixLayout
from r4b_kernels.prefix_attention import prefix_attention
from r4b_kernels.vision_attention import vision_attention

PREFIX = "r4b_prefix"
# transformers hands over many images with their cu_seqlens only to implementations that have "flash" in their name.
VISION = "r4b_flash_vision"


def register() -> None:
    """Make both names known to transformers; a second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (PREFIX, VISION):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask_segments)


def use_vision_attention(tower: Any) -> None:
    """Let a vision tower, such as Qwen3-VL's ``model.model.visual``, attend within all its images in one call.

    ``set_attn_implementation`` would look for a flash-attn package because of the name, so the config is set directly.
    Under "r4b_prefix" a tower works as well, image by image.
    """
    register()
    tower.config._attn_implementation = VISION


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    prefix_layout: PrefixLayout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D], key and value [B, Hk, T, D] -> ([B, T, Hq, D], no weights).

    The layout is that of the B * T tokens, row after row.

    Raises:
        ValueError: for what the kernels do not compute: a key/value cache, dropout, a sliding window, soft-capping,
            attention sinks, a mask of another form.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is set: {PREFIX} does not compute it; use another attn_implementation")
    if dropout:
        raise ValueError(f"dropout={dropout}: {PREFIX} has none; set attention_dropout=0 in the model's config")
    batch, heads, tokens, dim = query.shape
    if key.shape[2] != tokens:
        raise ValueError(f"{tokens} queries for {key.shape[2]} keys: {PREFIX} reads no cache; generate with another")
    if isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a tensor {list(attention_mask.shape)}: give prefix_layout instead")
    q, k, v = (x.transpose(1, 2).reshape(batch * tokens, -1, dim) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    def cu_seqlens() -> Tensor:
        if cu_seq_lens_q is not None:
            return cu_seq_lens_q.int()
        return torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens

    if not causal:
        out = vision_attention(q, k, v, cu_seqlens(), scale=scaling)
    else:
        if prefix_layout is not None:
            layout = prefix_layout
        elif attention_mask is not None and cu_seq_lens_q is None:
            layout = attention_mask.layout
        else:
            layout = _varlen(cu_seqlens())
        out = cast(Tensor, prefix_attention(q, k, v, layout, scale=scaling))
    return out.view(batch, tokens, heads, dim), None


class Segments:
    """What the models carry in place of a mask: their segments, looked for once, when a layer has no other layout."""

    def __init__(self, find: Callable[[], PrefixLayout]) -> None:
        self._find = find

    @functools.cached_property
    def layout(self) -> PrefixLayout:
        return self._find()


def mask_segments(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    allow_is_bidirectional_skip: bool | None = None,
    **_: Any,
) -> Segments | None:
    """The mask function of transformers, called once per forward."""
    if allow_is_bidirectional_skip is not None:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(f"attention_mask pads a bidirectional batch: {PREFIX} takes images by cu_seqlens only")
        return None
    if kv_length != q_length:
        raise ValueError(f"{q_length} queries for {kv_length} keys: {PREFIX} reads no cache; generate with another")
    shape = (batch_size, q_length)
    return Segments(functools.partial(_find_segments, shape, q_offset, mask_function, attention_mask, device))


def _find_segments(
    shape: tuple[int, int],
    q_offset: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> PrefixLayout:
    """The segments of a batch [B, T], read off its mask; waits for the device.

    A token begins a segment if it does not see the one before it, or if one of them is padding. Padding becomes
    segments of its own, which nobody reads.

    Raises:
        ValueError: for a mask that is not causal within such segments, or padding inside a sequence.
    """
    batch_size, q_length = shape
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(q_length, device=device)[None]

    def sees(other: Tensor) -> Tensor:
        """bool [B, T]: each token sees the other one."""
        inside = (other >= 0) & (other < q_length)
        return inside & mask_function(row, 0, token + q_offset, other.clamp(0, max(q_length - 1, 0)) + q_offset)

    real = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        real = attention_mask.bool()
    before = torch.nn.functional.pad(real, (1, 0))[:, :q_length]
    begins = ~sees(token - 1) | (real != before)
    first = torch.where(begins, token, 0).cummax(1).values
    if bool((sees(token + 1) | ~sees(first) | ((real & ~before).sum(1, keepdim=True) > 1)).any()):
        raise ValueError(f"the model's mask is not causal in segments: {PREFIX} cannot serve it; use sdpa or eager")
    starts = begins.flatten().nonzero().flatten()
    return _varlen(torch.nn.functional.pad(starts, (0, 1), value=batch_size * q_length))


def _varlen(cu_seqlens: Tensor) -> PrefixLayout:
    """Segments without parents."""
    return PrefixLayout(cu_seqlens.int(), cu_seqlens.new_full((cu_seqlens.numel() - 1,), -1, dtype=torch.int32))
