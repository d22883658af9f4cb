"""What the tests of the data engine's core share: pictures, records, and stages that are simple."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r4b_core.curate.runner import RecordWork, run_stage
from r4b_core.curate.stage import Outcome
from r4b_core.curate.store import StageStore
from r4b_core.data.records import Record, write_records


def picture(seed: int, size: tuple[int, int] = (48, 32), form: str = "PNG", **options: Any) -> bytes:
    """A smooth picture that differs from those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, form, **options)
    return file.getvalue()


def records(count: int, start: int = 0, source: str = "unit") -> list[Record]:
    return [
        Record(str(i), source, f"What is {i} plus {i}?", images=[b"picture %d" % i], answer=str(2 * i))
        for i in range(start, start + count)
    ]


def record_folder(folder: Path, sizes: Sequence[int]) -> Path:
    """Files of records, one per size."""
    start = 0
    for part, size in enumerate(sizes):
        write_records(folder / f"input-{part}.parquet", records(size, start))
        start += size
    return folder


class OddOut:
    """Drops odd ids, quarantines multiples of ten."""

    name = "odd-out"

    def __call__(self, records: Sequence[Record]) -> Outcome:
        outcome = Outcome()
        for record in records:
            if int(record.id) % 10 == 0:
                outcome.drop(record, "round", quarantined=True)
            elif int(record.id) % 2:
                outcome.drop(record, "odd", f"{record.id} is")
            else:
                outcome.kept.append(record)
        return outcome


@contextmanager
def open_odd_out(settings: Any) -> Iterator[OddOut]:
    yield OddOut()


class Dies:
    """Kills its process when it meets a record, unless a marker file says that it did already."""

    name = "dies"

    def __init__(self, at: str, marker: Path, always: bool) -> None:
        self.at, self.marker, self.always = at, marker, always

    def __call__(self, records: Sequence[Record]) -> Outcome:
        if any(record.id == self.at for record in records) and (self.always or not self.marker.exists()):
            self.marker.write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(kept=list(records))


@contextmanager
def open_dies(settings: tuple[str, str, bool]) -> Iterator[Dies]:
    yield Dies(settings[0], Path(settings[1]), settings[2])


class Fails:
    name = "fails"

    def __call__(self, records: Sequence[Record]) -> Outcome:
        raise KeyError("a mistake of ours")


@contextmanager
def open_fails(settings: Any) -> Iterator[Fails]:
    yield Fails()


def odd_out_work(batch: int = 7) -> RecordWork:
    return RecordWork(open_odd_out, None, batch)


def do(store: StageStore, workers: int = 0, batch: int = 7) -> None:
    run_stage(store, odd_out_work(batch), workers)


def published(folder: Path) -> dict[str, bytes]:
    """Every file of a stage's output that does not start with a dot."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_file()}
