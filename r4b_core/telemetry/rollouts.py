"""Rollouts of a step as Parquet: what was asked, what was answered in both modes, and what it earned.

One row per rollout. The images of a group, as PNG bytes, stand in its first row only and are null in the others.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from r4b_core.data.schema import Sample
from r4b_core.modes import Mode
from r4b_core.rollout.types import FinishReason, Group, Rollout
from r4b_core.telemetry.files import sync_folder

SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("difficulty", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("image", pa.list_(pa.binary())),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("mode", pa.string()),
        ("taken", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("entropies", pa.list_(pa.float32())),
        ("forced", pa.int32()),
        ("finish", pa.string()),
        ("seed", pa.int64()),
        ("thinking_probability", pa.float64()),
        ("reward", pa.float64()),
        ("reward_reason", pa.string()),
        ("advantage", pa.float64()),
    ],
    metadata={"r4b_rollouts": "1"},
)


def rollouts_path(run: Path, stage: str, step: int) -> Path:
    """``rollouts/<stage>-step_000010.parquet`` in a run folder."""
    return run / "rollouts" / f"{stage}-step_{step:06d}.parquet"


def write_rollouts(path: Path, groups: Sequence[Group]) -> None:
    """Write groups to ``path``, whole or not at all."""
    table = pa.Table.from_pylist(list(_rows(groups)), schema=SCHEMA)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_rollouts(path: str | Path, *, images: bool = True) -> list[Group]:
    """The groups as they were written, log-probs and entropies rounded to float32.

    Args:
        images: False leaves ``Sample.images`` empty and decodes nothing.

    Raises:
        ValueError: the file is not one of these.
    """
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it is not a rollouts file of a run folder")
    groups: dict[int, Group] = {}
    for row in table.to_pylist():
        if row["group"] not in groups:
            sample = Sample(
                id=row["sample_id"],
                source=row["source"],
                images=[decode_png(data) for data in row["image"] or []] if images else [],
                question=row["question"],
                answer=row["answer"],
                difficulty=row["difficulty"],
            )
            groups[row["group"]] = Group(sample=sample, prompt_tokens=row["prompt_tokens"] or [])
        groups[row["group"]].rollouts.append(_rollout(row))
    return list(groups.values())


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 [height, width, 3] array."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3]; only PNG is accepted.

    Raises:
        ValueError: the bytes are not a PNG image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"an image in a rollouts file cannot be read as PNG: {error}") from error


def _rows(groups: Sequence[Group]) -> Iterator[dict[str, object]]:
    for index, group in enumerate(groups):
        sample = group.sample
        for position, rollout in enumerate(group.rollouts):
            yield {
                "group": index,
                "sample_id": sample.id,
                "source": sample.source,
                "difficulty": sample.difficulty,
                "question": sample.question,
                "answer": sample.answer,
                "image": [encode_png(image) for image in sample.images] if position == 0 else None,
                "prompt_tokens": group.prompt_tokens if position == 0 else None,
                "mode": str(rollout.mode),
                "taken": str(rollout.taken),
                "text": rollout.text,
                "tokens": rollout.tokens,
                "logprobs": rollout.logprobs,
                "entropies": rollout.entropies,
                "forced": rollout.forced,
                "finish": str(rollout.finish),
                "seed": rollout.seed,
                "thinking_probability": rollout.thinking_probability,
                "reward": rollout.reward,
                "reward_reason": rollout.reward_reason,
                "advantage": rollout.advantage,
            }


def _rollout(row: dict[str, object]) -> Rollout:
    names = ("tokens", "logprobs", "entropies", "forced", "seed", "thinking_probability", "reward", "reward_reason")
    values = {name: row[name] for name in (*names, "text", "advantage")}
    return Rollout(
        mode=Mode(row["mode"]),
        taken=Mode(row["taken"]),
        finish=FinishReason(row["finish"]),
        **values,  # type: ignore[arg-type]
    )
