"""The report's viewer: a choice of groups, small enough to live inside the page."""

from __future__ import annotations

import base64
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from r4b_core.rollout.types import FinishReason, Group, Rollout
from r4b_core.telemetry.bimode import effective_mode
from r4b_core.telemetry.rollouts import encode_png, read_rollouts

MAX_FILES = 8
MAX_GROUPS_PER_FILE = 8
MAX_TEXT = 4000
MAX_SIDE = 448
MAX_BYTES = 2_400_000


@dataclass
class Viewer:
    """What the page embeds.

    Attributes:
        steps: [{"label", "file", "groups": [...]}], JSON-ready.
        shown, total: groups embedded and groups in all rollout files.
        problems: sentences about files that could not be read.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    shown: int = 0
    total: int = 0
    problems: list[str] = field(default_factory=list)


def collect_groups(run: Path, *, max_bytes: int = MAX_BYTES) -> Viewer:
    """Choose steps evenly over the run (first and last included), and groups of every difficulty within each.

    Groups whose rewards differ come first: where all are equal there is nothing to see. Never more than ``max_bytes``
    of JSON; every step gets an equal share of it.
    """
    viewer = Viewer()
    files: list[Path] = []
    for path in sorted((run / "rollouts").glob("*.parquet")):
        try:
            column = pq.read_table(path, columns=["group"]).column("group").to_pylist()
        except (OSError, ValueError, KeyError) as error:
            viewer.problems.append(f"{path.name} could not be read ({type(error).__name__}).")
            continue
        if column:
            viewer.total += len(set(column))
            files.append(path)
    chosen = spread(files, MAX_FILES)
    for path in chosen:
        try:
            groups = read_rollouts(path)
        except ValueError as error:
            viewer.problems.append(str(error))
            continue
        entries: list[dict[str, Any]] = []
        room = max_bytes // len(chosen)
        for index in select(groups, MAX_GROUPS_PER_FILE):
            entry = _entry(index, groups[index])
            room -= len(json.dumps(entry))
            if room < 0:
                break
            entries.append(entry)
        if entries:
            stage, _, step = path.stem.rpartition("-step_")
            viewer.steps.append({"label": f"{stage}, step {int(step)}", "file": path.name, "groups": entries})
            viewer.shown += len(entries)
    return viewer


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def select(groups: Sequence[Group], count: int) -> list[int]:
    """Indices of up to ``count`` groups, difficulties in turn, within each those with unequal rewards first."""
    queues: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        queues[group.sample.difficulty].append(index)
    for queue in queues.values():
        queue.sort(key=lambda i: (len({r.reward for r in groups[i].rollouts}) < 2, i))
    picked: list[int] = []
    while len(picked) < count and any(queues.values()):
        for name in sorted(queues, reverse=True):
            if queues[name] and len(picked) < count:
                picked.append(queues[name].pop(0))
    return sorted(picked)


def _entry(index: int, group: Group) -> dict[str, Any]:
    sample = group.sample
    return {
        "index": index,
        "id": sample.id,
        "source": sample.source,
        "difficulty": sample.difficulty,
        "question": _cut(sample.question),
        "answer": _cut(sample.answer),
        "images": [_data_url(image) for image in sample.images],
        "rollouts": [_rollout(rollout) for rollout in group.rollouts],
    }


def _rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        "mode": str(effective_mode(rollout)),
        "free": rollout.mode != effective_mode(rollout),
        "text": _cut(rollout.text),
        "tokens": len(rollout.tokens),
        "truncated": rollout.finish is FinishReason.LENGTH,
        "p": _number(rollout.thinking_probability),
        "reward": _number(rollout.reward),
        "reason": _cut(rollout.reward_reason),
        "advantage": _number(rollout.advantage),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _data_url(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode("ascii")
