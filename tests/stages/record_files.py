"""What the tests of training on records share: folders of tiny processors, and files of records with photographs."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r4b_core.data.records import Record, write_records
from tests.models.processing_oracle import ByteTokenizer, photographs

COUNTS = {"one": 1, "two": 2, "three": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"vocab_size": 320, "num_layers": 2, "vision_num_layers": 2},
    "r4b": {"vocab_size": 320, "patch_size": 8, "vision_grid": [3, 3], "num_layers": 1},
}


def write_processor(folder: Path, family: str) -> Path:
    """A tokenizer of bytes and tags, and image settings under which a photograph is a few tokens."""
    tokenizer = ByteTokenizer("<|image_pad|>" if family == "qwen3_vl" else "<image>")
    tokenizer.pretrained.add_tokens(["\n\n"])
    tokenizer.pretrained.save_pretrained(folder)
    settings: dict[str, Any] = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 2048}}
    if family == "r4b":
        settings = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        settings["image_grid_pinpoints"] = [[24, 24], [24, 48], [48, 24]]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@cache
def pictures() -> tuple[bytes, ...]:
    """Pieces of real photographs as PNG, JPEG and WEBP."""
    china, flower = photographs()["china"], photographs()["flower"]
    pieces = [china[:120, :200], flower[100:260, 200:340], china[200:330, 300:380], flower[:96, :96]]
    made = []
    for piece, kind in zip(pieces, ("PNG", "JPEG", "WEBP", "PNG"), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(piece)).save(buffer, kind)
        made.append(buffer.getvalue())
    return tuple(made)


def make_records(count: int, start: int = 0) -> list[Record]:
    """Thinking and direct records in turn, from two sources, with measured pass rates; a few texts only."""
    made = []
    for number in range(start, start + count):
        word, answer = list(COUNTS.items())[number % 3]
        thinks = number % 2 == 0
        reasoning = f"\n{word} is meant" if thinks else "\n\n"
        made.append(
            Record(
                id=str(number),
                source=("words", "numbers/en")[number % 2],
                question=f"Write {word} as a digit.",
                images=[pictures()[number % 4]] if number % 5 else [],
                answer=str(answer),
                response=f"<think>{reasoning}\n</think>\n\n<answer>{answer}</answer>",
                mode="thinking" if thinks else "direct",
                tries=4,
                right=number % 5,
            )
        )
    return made


def write_data(folder: Path, count: int = 48) -> Path:
    """``train-*.parquet`` of small row groups, and ``held-out.parquet``."""
    records = make_records(count)
    write_records(folder / "train-0.parquet", records[: count // 2], row_group=8)
    write_records(folder / "train-1.parquet", records[count // 2 :], row_group=8)
    write_records(folder / "held-out.parquet", make_records(8, start=1000))
    return folder
