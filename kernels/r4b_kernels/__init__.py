"""Kernels for packed, variable-length, prefix-shared batches. Needs torch and nothing else; knows no trainer."""

from __future__ import annotations

from r4b_kernels.dispatch import BackendError
from r4b_kernels.layout import PrefixLayout
from r4b_kernels.prefix_attention import prefix_attention
from r4b_kernels.qk_norm_mrope import qk_norm_mrope
from r4b_kernels.scatter_vision import scatter_vision
from r4b_kernels.vision_attention import vision_attention

__all__ = [
    "BackendError",
    "PrefixLayout",
    "prefix_attention",
    "qk_norm_mrope",
    "scatter_vision",
    "vision_attention",
]
