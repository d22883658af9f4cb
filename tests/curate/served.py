"""What the tests of generate and score share: records, settings, and stages run against a stand-in."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r4b_core.curate.asking import AskWork
from r4b_core.curate.demo.standin import Fault, Kind, Plan, Rule
from r4b_core.curate.endpoints import CallSettings
from r4b_core.curate.generate import GenerateSettings, open_generate
from r4b_core.curate.runner import run_stage
from r4b_core.curate.score import ScoreSettings, open_score
from r4b_core.curate.store import open_stage, partitions_of
from r4b_core.curate.wire import ServedModel
from r4b_core.data.records import Record, write_records

QUICK = CallSettings(
    connect_timeout_s=10,
    total_timeout_s=30,
    idle_timeout_s=10,
    tries=4,
    backoff_s=0.01,
    max_backoff_s=0.05,
    outage_s=5,
    max_reply_mb=1,
)


def picture(width: int = 48, height: int = 40, kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def records(count: int, images: bool = True) -> list[Record]:
    return [
        Record(
            id=f"{number:04d}",
            source="sums",
            question=f"{'<image>' if images else ''}What is {number} + 1?",
            images=[picture()] if images else [],
            answer=str(number + 1),
        )
        for number in range(count)
    ]


def served(url: str | Sequence[str], model: str = "stand-in", **settings: Any) -> ServedModel:
    urls = [url] if isinstance(url, str) else url
    endpoints = [{"url": each, "concurrency": 16} for each in urls]
    return ServedModel.model_validate({"model": model, "endpoints": endpoints, "calls": QUICK} | settings)


def rules(count: int, **by_number: Rule) -> dict[str, Rule]:
    """Right answers to `records`; ``by_number={"n3": Rule(...)}`` gives record 3 another rule."""
    table = {f"sums/{number:04d}": Rule(answer=str(number + 1)) for number in range(count)}
    for name, rule in by_number.items():
        table[f"sums/{int(name[1:]):04d}"] = rule
    return table


def faulty_rules(count: int, k: int = 1) -> dict[str, Rule]:
    """Right and wrong answers with every fault that heals, over and over."""
    faults = [(), (Fault.RATE_LIMITED,) * 2, (Fault.SERVER_ERROR,), (Fault.DROPPED,), (Fault.HALF,), (Fault.HTML,)]
    faults += [(Fault.NOT_JSON,), (Fault.SERVER_ERROR, Fault.DROPPED), (), (), ()]
    kinds = [(Kind.RIGHT,), (Kind.WRONG, Kind.RIGHT), (Kind.TRUNCATED, Kind.RIGHT), (Kind.REPETITIVE,)]
    return {
        f"sums/{number:04d}": Rule(
            answer=str(number + 1),
            kinds=kinds[number % len(kinds)],
            heals_after=1 if number % 8 == 3 else None,
            faults=tuple(faults[number % len(faults)]),
        )
        for number in range(count)
    }


def write_parts(folder: Path, rows: Sequence[Record], parts: int) -> None:
    size = -(-len(rows) // parts)
    for part in range(parts):
        write_records(folder / f"part-{part:05d}.parquet", rows[part * size : (part + 1) * size])


def run_asking(stage: str, settings: GenerateSettings | ScoreSettings, source: Path, folder: Path) -> None:
    """Run a whole stage from a folder into another."""
    make = {"generate": open_generate, "score": open_score}[stage]
    with open_stage(folder, stage, settings.content, partitions_of(source)) as store:
        run_stage(store, AskWork(make, settings, folder, tuple(store.pending())), workers=0)


def output(folder: Path) -> dict[str, bytes]:
    """Everything that a stage published."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def plan(models: Mapping[str, Mapping[str, Rule]] | None = None, **settings: Any) -> Plan:
    return Plan(models=models or {"stand-in": {}}, words=20, **settings)


if __name__ == "__main__":  # a process to be killed: stage, settings as JSON, source, folder
    name, text, source, folder = sys.argv[1:]
    schema = {"generate": GenerateSettings, "score": ScoreSettings}[name]
    run_asking(name, schema.model_validate(json.loads(text)), Path(source), Path(folder))
