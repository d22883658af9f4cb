"""Checkpoints in from Hugging Face and out to it."""

from r4b_core.models.convert.huggingface import read_config
from r4b_core.models.convert.load import load_weights
from r4b_core.models.convert.settings import ConversionError

__all__ = ["ConversionError", "load_weights", "read_config"]
