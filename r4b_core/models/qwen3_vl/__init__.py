"""Qwen3-VL: ViT with DeepStack, patch mergers, Qwen3 decoder with interleaved M-RoPE."""

from r4b_core.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from r4b_core.models.qwen3_vl.model import Qwen3VLModel
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt

__all__ = ["SIZES", "Qwen3VLConfig", "Qwen3VLModel", "Qwen3VLPrompt"]
