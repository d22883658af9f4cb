"""Small Hugging Face checkpoints with their tokenizer and image settings, as a user downloads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken
from torch import nn

from r4b_core.config.recipe import ModelConfig
from r4b_core.models.families import resolve
from tests.models import qwen3_vl_oracle
from tests.models.convert_cases import TILES, write_theirs
from tests.models.processing_oracle import ByteTokenizer, photographs

IMAGE_TAG = {"r4b": "<image>", "qwen3_vl": "<|image_pad|>"}
QWEN_SHAPE: dict[str, Any] = {**qwen3_vl_oracle.SMALL, "vocab_size": 320, "patch_size": 16}
MIN_PIXELS, MAX_PIXELS = 32 * 32, 96 * 96
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer(family: str) -> ByteTokenizer:
    """Bytes and tags, and two newlines in one token, as Qwen's has them."""
    made = ByteTokenizer(IMAGE_TAG[family])
    made.pretrained.add_tokens([AddedToken("\n\n", normalized=False)])
    return made


def write_checkpoint(folder: Path, family: str) -> nn.Module | None:
    """Returns transformers' model (Qwen3-VL)."""
    theirs = None
    if family == "qwen3_vl":
        theirs = qwen3_vl_oracle.make_oracle(resolve(ModelConfig(family=family, shape=QWEN_SHAPE)))
        theirs.config.image_token_id = tokenizer(family).image_token
        theirs.save_pretrained(folder)
        settings: dict[str, Any] = {"size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, "patch_size": 16}
    else:
        write_theirs(folder, family)
        settings = {
            "size": {"height": TILES.tile_size, "width": TILES.tile_size},
            "image_grid_pinpoints": TILES.sizes,
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | _HALF))
    tokenizer(family).pretrained.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return theirs


def write_photograph(folder: Path, name: str = "china") -> Path:
    path = folder / f"{name}.png"
    Image.fromarray(np.ascontiguousarray(photographs()[name][::4, ::4])).save(path)
    return path
