"""Records per second of `standardize` against `datasets.map` with the same functions, both in one process.

    r4b bench data standardize

MMFineReason's columns; pictures are crops of the two photographs that scikit-learn ships. The functions are those of
the stage: text rules, the answer, the picture's check and hash, the signature. Ours also looks for duplicates and
writes Parquet twice; the rival writes its Arrow file and removes nothing. Two rivals:

``map``        the `Image` column as `datasets` loads it: decoded to a picture, encoded as PNG when the row is written
``map, bytes`` the column cast to bytes, so that nothing is decoded but by our function

Records per second, 2026-11-20, AMD EPYC, one thread of 2 cores shared with other jobs, Python 3.11, datasets 5.2.0,
pyarrow 26.0.1, Pillow 13.0.0, commit 14288ed; medians of processor time, sides in turns, pictures in one run:

=========  ======  ===============  ==============
case       ours    map              map, bytes
=========  ======  ===============  ==============
text only  7054    6222 (1.13x)     5978 (1.18x)
160x106    1568    314 (5.00x)      1363 (1.15x)
320x213    944     83 (11.4x)       910 (1.04x)
600x400    496     23 (21.2x)       459 (1.08x)
=========  ======  ===============  ==============

Where pictures pass through `datasets` as pictures the gain is that they keep their bytes. Where they do not, all sides
spend their time in the same functions, and processes are what makes ours faster.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.turns import in_turns
from r4b_core.curate.runner import run_stage
from r4b_core.curate.standardize import text
from r4b_core.curate.standardize.pictures import Picture, check_picture, perceptual_hash
from r4b_core.curate.standardize.run import standardize
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.standardize.signatures import signature
from r4b_core.curate.store import Counts
from r4b_core.data.records import Record

TEXT_ROWS, PICTURE_ROWS = 2000, 120
TURNS = 3
SETTINGS = StandardizeSettings()


def rows(side: int | None) -> list[dict[str, Any]]:
    """Questions about crops of photographs, or about nothing."""
    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    made = []
    for i in range(TEXT_ROWS if side is None else PICTURE_ROWS):
        row = {
            "id": i,
            "source": "photographs",
            "question": f"<image>\n{i}. How many objects, of the {rng.integers(10**6)} that one could name, lie left "
            f"of the middle of this picture if each counts {i} times? (5 points) See https://example.org/{i}",
            "answer": None,
            "original_answer": f"Counting from the left, we find that \\boxed{{{i}}} is right.",
            "qwen3vl_235b_thinking_response": "<think>\n" + "step by step " * 600 + "</think><answer>1</answer>",
            "pass_rate": 0.25,
            "is_consistent": True,
        }
        if side is None:
            row["question"] = row["question"].removeprefix("<image>\n")
        else:
            top, left = rng.integers(0, 427 - side * 2 // 3 + 1), rng.integers(0, 640 - side + 1)
            crop = photographs[i % 2][top : top + side * 2 // 3, left : left + side]
            file = io.BytesIO()
            Image.fromarray(crop).save(file, "JPEG", quality=90)
            row["image"] = {"bytes": file.getvalue(), "path": None}
        made.append(row)
    return made


def ours(path: Path, fresh: Callable[[], Path]) -> Counts:
    return standardize(
        fresh(), [InputSettings(path=str(path))], SETTINGS, lambda store, work, told: run_stage(store, work, 0, told)
    )


def clean_row(row: dict[str, Any], pictures: list[Picture]) -> dict[str, Any]:
    """What the stage does to a row, as a function for `map`."""
    question = text.clean(row["question"], SETTINGS.rules)
    assert not text.is_empty(question) and not text.is_weak(question) and not text.foreign_share(question) > 1
    answer = text.find_answer(row["answer"], row["original_answer"], SETTINGS.max_answer_chars)
    record = Record(str(row["id"]), row["source"], question)
    made = signature(record, pictures, row["id"])
    return {"question": question, "answer": answer, "minhash": made[-1], "exact": f"{made[1][0]:x}{made[1][1]:x}"}


def map_pictures(path: Path, cache: Path) -> datasets.Dataset:
    """As one writes it: the picture comes decoded and goes back as a picture."""

    def function(row: dict[str, Any]) -> dict[str, Any]:
        pictures = []
        if (image := row.get("image")) is not None:
            image = image.convert("RGB")
            if max(image.size) > SETTINGS.max_side:
                image.thumbnail((SETTINGS.max_side, SETTINGS.max_side), Image.Resampling.LANCZOS)
            pictures = [Picture(b"", b"", perceptual_hash(image))]
        return clean_row(row, pictures) | ({"image": image} if image is not None else {})

    return load(path, cache).map(function)


def map_bytes(path: Path, cache: Path) -> datasets.Dataset:
    """With the picture as bytes, checked by our function."""
    limits = dict(max_pixels=SETTINGS.max_image_pixels, max_bytes=SETTINGS.max_image_bytes)

    def function(row: dict[str, Any]) -> dict[str, Any]:
        if (image := row.get("image")) is None:
            return clean_row(row, [])
        picture = check_picture(image["bytes"], max_side=SETTINGS.max_side, **limits)
        return clean_row(row, [picture]) | {"image": {"bytes": picture.data, "path": None}}

    loaded = load(path, cache)
    if "image" in loaded.column_names:
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    return loaded.map(function)


def load(path: Path, cache: Path) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(cache), split="train")


@pytest.mark.parametrize("side", [None, 160, 320, 600], ids=["text only", "160x106", "320x213", "600x400"])
def test_standardize(side: int | None, tmp_path: Path, benchmark: Any) -> None:
    datasets.disable_progress_bars()
    path = tmp_path / "rows.parquet"
    raw = rows(side)
    made = datasets.Dataset.from_list(raw)
    if side is not None:
        made = made.cast_column("image", datasets.Image())
    made.to_parquet(str(path))
    numbers = itertools.count()

    def fresh() -> Path:
        return tmp_path / f"run-{next(numbers)}"

    sides = {
        "ours": lambda: ours(path, fresh),
        "map": lambda: map_pictures(path, fresh()),
        "map, bytes": lambda: map_bytes(path, fresh()),
    }
    counts = sides["ours"]()
    mapped = sides["map, bytes"]()
    assert counts.num_kept == len(mapped) == len(raw)

    assert mapped[7]["answer"] == "7"
    times = in_turns(sides, TURNS)
    benchmark.pedantic(sides["ours"], rounds=1)
    rate = {name: len(raw) / seconds for name, seconds in times.seconds.items()}
    benchmark.extra_info.update(
        ours=times.seconds["ours"],
        rivals={name: seconds for name, seconds in times.seconds.items() if name != "ours"},
        clock=times.clock,
        wall_seconds=times.wall,
        records_per_second=rate,
        datasets=datasets.__version__,
    )
    shown = ", ".join(f"{name} {rate[name]:.0f} ({rate['ours'] / rate[name]:.2f}x)" for name in sides)
    print(f"\n{side}: records/s {shown} ({times.clock})")
