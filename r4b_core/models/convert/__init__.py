"""Checkpoints in from Hugging Face and out to it; see docs/convert.md."""

from r4b_core.models.convert.huggingface import read_config
from r4b_core.models.convert.load import load_weights
from r4b_core.models.convert.run import find_like, to_huggingface, to_megatron
from r4b_core.models.convert.settings import ConversionError

__all__ = ["ConversionError", "find_like", "load_weights", "read_config", "to_huggingface", "to_megatron"]
