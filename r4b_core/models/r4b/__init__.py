"""R-4B: SigLIP2-style ViT, LayerNorm-MLP projector, Qwen3 decoder (R-4B appendix B.1)."""

from r4b_core.models.r4b.config import SIZES, R4BConfig
from r4b_core.models.r4b.model import R4BModel

__all__ = ["SIZES", "R4BConfig", "R4BModel"]
