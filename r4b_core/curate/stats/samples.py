"""The records that the page shows whole: some that went through, and some of each reason that stopped one."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from r4b_core.curate.stage import Drop
from r4b_core.curate.stats.collect import StageFigures
from r4b_core.data.images import ImageError, open_image
from r4b_core.data.records import Record, from_table
from r4b_core.telemetry.viewer import spread

MAX_FILES = 8
MAX_KEPT = 40
MAX_PER_REASON = 3
MAX_DROPS_READ = 5_000
MAX_TEXT = 6000
MAX_SIDE = 420
MAX_BYTES = 3_000_000


def collect_samples(stages: Sequence[StageFigures], max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """Entries for the browser, JSON-ready: first what the last stage kept, then what each stage let go.

    A few partitions stand for all, and of these only the row groups that hold a chosen record are read.
    """
    room = max_bytes
    entries: list[dict[str, Any]] = []
    last = stages[-1]
    kept = [(record, last.name, None) for record in _kept(last.folder)]
    for record, stage, drop in [*kept, *_dropped(stages)]:
        entry = _entry(record, stage, drop)
        room -= len(json.dumps(entry))
        if room < 0:
            break
        entries.append(entry)
    return entries


def _kept(folder: Path) -> Iterator[Record]:
    """Up to ``MAX_KEPT`` records, evenly over up to ``MAX_FILES`` partitions."""
    paths = [path for path in sorted(folder.glob("part-*.parquet")) if pq.read_metadata(path).num_rows]
    chosen = spread(paths, MAX_FILES)
    for path in chosen:
        rows = range(pq.read_metadata(path).num_rows)
        yield from _rows(path, spread(rows, max(2, MAX_KEPT // len(chosen))))


def _dropped(stages: Sequence[StageFigures]) -> Iterator[tuple[Record | None, str, Drop]]:
    """The first few of each stage and reason, with the record where the stage before still has it."""
    for number, stage in enumerate(stages):
        seen: Counter[str] = Counter()
        for path in spread(sorted(stage.folder.glob("part-*.dropped.jsonl")), MAX_FILES):
            picked: list[Drop] = []
            with path.open(encoding="utf-8") as lines:
                for line in islice(lines, MAX_DROPS_READ):
                    drop = Drop(**json.loads(line))
                    if seen[drop.reason] < MAX_PER_REASON:
                        seen[drop.reason] += 1
                        picked.append(drop)
            part = path.name.removesuffix(".dropped.jsonl")
            before = _find(stages[number - 1].folder / f"{part}.parquet", picked) if number else {}
            for drop in picked:
                yield before.get((drop.source, drop.id)), stage.name, drop


def _find(path: Path, drops: Sequence[Drop]) -> dict[tuple[str, str], Record]:
    """The records of a file that were dropped later, by (source, id)."""
    if not drops or not path.is_file():
        return {}
    keys = pq.read_table(path, columns=["source", "id"]).to_pydict()
    wanted = {(drop.source, drop.id) for drop in drops}
    rows = [row for row, key in enumerate(zip(keys["source"], keys["id"], strict=True)) if key in wanted]
    return {(record.source, record.id): record for record in _rows(path, rows)}


def _rows(path: Path, rows: Sequence[int]) -> Iterator[Record]:
    """Single rows of a Parquet file, in order."""
    file, first = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if mine := [row - first for row in rows if first <= row < first + count]:
            yield from from_table(file.read_row_group(group).take(mine))
        first += count


def _entry(record: Record | None, stage: str, why: Drop | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "stage": stage,
        "reason": why.reason if why else None,
        "detail": _cut(why.detail) if why else "",
        "id": record.id if record else why.id if why else "",
        "source": record.source if record else why.source if why else "",
    }
    if record is None:
        return entry | {"place": f"{why.file}, row {why.row}" if why and why.file else ""}
    return entry | {
        "images": [url for image in record.images[:4] if (url := _thumbnail(image))],
        "question": _cut(record.question),
        "answer": _cut(record.answer or ""),
        "caption": _cut(record.caption or ""),
        "response": _cut(record.response or ""),
        "finish": record.finish_reason,
        "tokens": record.response_tokens,
        "extracted": _cut(record.extracted or ""),
        "verdict": record.verdict,
        "verdict_reason": record.verdict_reason,
        "rate": [record.right, record.tries] if record.tries else None,
        "mode": record.mode,
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"


def _thumbnail(data: bytes) -> str:
    """A small JPEG as a data: address, or nothing for what cannot be opened safely."""
    try:
        image = Image.fromarray(open_image(data))
    except ImageError:
        return ""
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "PNG" if np.asarray(image).size <= 3 * 64 * 64 else "JPEG"
    out = io.BytesIO()
    image.save(out, kind, quality=82)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode("ascii")
