"""metrics.jsonl: one JSON object a line, the truth that every other view of a run is made from.

A line holds ``stage``, ``step``, ``time`` (Unix seconds) and metrics with slashes in their names. JSON knows no
non-finite numbers, so they are the strings "nan", "inf" and "-inf" in the file and floats again when read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from r4b_core.telemetry.alarms import Alarms
from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.timeline import Timeline

RESERVED = ("stage", "step", "time")
TIME_PREFIXES = ("timing_s/", "perf/")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Logger(Protocol):
    """Something else that wants every line: the console, TensorBoard, Weights & Biases, trackio."""

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None: ...

    def alarm(self, stage: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Append-only log of a run. Alarms are judged here, so that no stage can forget them.

    Args:
        path: the metrics.jsonl file.
        timeline: its seconds since the previous line go into the next one as ``timing_s/<phase>``.
        alarms: rules that every line passes through.
        active: False on every rank but the main one; then nothing is written.
    """

    def __init__(
        self,
        path: Path,
        *,
        timeline: Timeline,
        alarms: Alarms,
        active: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.active = active
        self.loggers: list[Logger] = []
        self._timeline = timeline
        self._alarms = alarms
        self._clock = clock
        self._descriptor: int | None = None

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; it is in the operating system's hands when this returns, so a killed process loses nothing.

        A value ``tokens`` (tokens processed in this step) yields ``perf/tokens_per_s`` where it is not given. A value
        named ``alarm/...`` is a message, shown as an alarm on the console and in the report.
        Log step k before its checkpoint is saved: a resumed run begins after the lines of step k.

        Raises:
            ValueError: a reserved name, or a value that is neither a number nor a short string.
        """
        timing = self._timeline.drain()
        if not self.active:
            return
        record = {name: _plain(name, value) for name, value in values.items()}
        seconds = sum(timing.values())
        if "tokens" in record and seconds > 0:
            record.setdefault("perf/tokens_per_s", round(record["tokens"] / seconds, 3))
        self._write(stage, step, record | timing)
        for logger in self.loggers:
            logger.log(stage, step, record | timing)
            for name, value in record.items():
                if name.startswith("alarm/"):
                    logger.alarm(stage, step, str(value))
        for alarm in self._alarms.update(stage, step, record):
            self._write(stage, step, {f"alarm/{alarm.name}": alarm.message})
            for logger in self.loggers:
                logger.alarm(stage, step, alarm.message)

    def truncate_after(self, stage: str, step: int) -> list[tuple[str, int]]:
        """Cut the file back to what it was when (stage, step) had just been logged; step 0 is before the stage's first.

        The file is in the order of time: everything from the first later line of that stage on goes, and so does
        whatever was written after its last line that stays. Alarms are replayed over what is left.

        Returns:
            The (stage, step) pairs that were cut.
        """
        lines = _complete_lines(self.path)
        records = [_parse(self.path, number, line) for number, line in enumerate(lines, 1)]
        keep = len(records)
        mine = [index for index, record in enumerate(records) if record["stage"] == stage]
        later = [index for index in mine if records[index]["step"] > step]
        if later:
            keep = later[0]
        elif mine:
            keep = mine[-1] + 1
        self.close()
        if self.active:
            write_atomic(self.path, b"".join(line + b"\n" for line in lines[:keep]))
        self._alarms.replay(records[:keep])
        return [(record["stage"], record["step"]) for record in records[keep:]]

    def clear(self) -> None:
        """Begin an empty file."""
        self.close()
        if self.active:
            write_atomic(self.path, b"")

    def sync(self) -> None:
        """Force the lines to the disk, for the moment before a checkpoint counts as complete."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = {"stage": stage, "step": step, "time": round(self._clock(), 3)} | {
            k: _encode(v) for k, v in values.items()
        }
        raw = json.dumps(line, allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n"
        written = os.write(self._descriptor, raw)
        if written != len(raw):
            raise OSError(f"{self.path}: only {written} of {len(raw)} bytes could be written; is the disk full?")


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl, in order; a half-written last line is left out.

    Raises:
        ValueError: a damaged line that is not the last one.
    """
    path = Path(path)
    return [_parse(path, number, line) for number, line in enumerate(_complete_lines(path), 1)]


def without_times(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records without what may differ between two runs of one recipe: ``time``, ``timing_s/*``, ``perf/*``."""
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith(TIME_PREFIXES)} for record in records]


def _complete_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    del rest  # what follows the last newline was cut off by a crash, or is empty
    # A file system may fill a lost tail with zero bytes after a power cut.
    while lines and not lines[-1].strip(b"\0 "):
        lines.pop()
    return lines


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record["stage"], str) or not isinstance(record["step"], int):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number} is not a metrics line ({line[:80]!r}): the file was edited or damaged; "
            "remove that line, or start the run in another folder"
        ) from error
    return {name: _decode(name, value) for name, value in record.items()}


def _plain(name: str, value: Any) -> float | int | str:
    if name in RESERVED:
        raise ValueError(f"metric name {name!r} is reserved for the line itself: choose another")
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float, str)):
        return value
    raise ValueError(f"metric {name!r} is a {type(value).__name__}: log a number, a scalar tensor or a short string")


def _encode(value: float | int | str) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _decode(name: str, value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) and name not in RESERVED else value
