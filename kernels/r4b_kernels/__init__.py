"""Kernels for packed, variable-length, prefix-shared batches. Needs torch and nothing else; knows no trainer."""

from __future__ import annotations

from r4b_kernels.decode_attention import decode_attention
from r4b_kernels.dispatch import BackendError
from r4b_kernels.draw_tokens import draw_tokens
from r4b_kernels.group_advantage import Advantage, group_advantage
from r4b_kernels.layout import PrefixLayout
from r4b_kernels.linear_distill import DistillLoss, linear_distill
from r4b_kernels.linear_logprob import linear_logprob
from r4b_kernels.merge_norm import merge_norm
from r4b_kernels.pack_groups import Bin, PackCost, PackPlan, pack_groups
from r4b_kernels.policy_loss_head import PolicyLoss, policy_loss_head
from r4b_kernels.prefix_attention import prefix_attention
from r4b_kernels.qk_norm_mrope import qk_norm_mrope
from r4b_kernels.rms_norm import rms_norm
from r4b_kernels.scatter_vision import scatter_vision
from r4b_kernels.swiglu import swiglu
from r4b_kernels.vision_attention import vision_attention

__all__ = [
    "Advantage",
    "BackendError",
    "Bin",
    "DistillLoss",
    "PackCost",
    "PackPlan",
    "PolicyLoss",
    "PrefixLayout",
    "decode_attention",
    "draw_tokens",
    "group_advantage",
    "linear_distill",
    "linear_logprob",
    "merge_norm",
    "pack_groups",
    "policy_loss_head",
    "prefix_attention",
    "qk_norm_mrope",
    "rms_norm",
    "scatter_vision",
    "swiglu",
    "vision_attention",
]
