"""The figures of the page, from the folders that stages wrote; only small columns are read, a batch at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from r4b_core.curate.store import STAGE_FILE, Counts, folder_counts

OTHER = "other"
MAX_SOURCES = 24
_LENGTH_BARS = 24


@dataclass(frozen=True)
class StageFigures:
    """What one stage did.

    Attributes:
        name: of the stage.
        folder: where its output lies.
        counts: in, kept, dropped and quarantined, by source and reason.
        finished, partitions: how far it is.
    """

    name: str
    folder: Path
    counts: Counts
    finished: int
    partitions: int

    @property
    def reasons(self) -> list[tuple[str, int, dict[str, int], bool]]:
        """(reason, count, count by source, quarantined) of everything let go, the most frequent first."""
        found: dict[tuple[str, bool], Counter[str]] = {}
        for table, quarantined in ((self.counts.dropped, False), (self.counts.quarantined, True)):
            for (source, reason), count in table.items():
                found.setdefault((reason, quarantined), Counter())[source] += count
        rows = [(reason, total.total(), dict(total), bad) for (reason, bad), total in found.items()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram; ``label`` stands below it."""

    label: str
    count: int


@dataclass(frozen=True)
class Histogram:
    """How a number is spread over records. ``missing`` records do not have it."""

    title: str
    note: str
    bars: list[Bar]
    missing: int = 0

    @property
    def highest(self) -> int:
        return max((bar.count for bar in self.bars), default=0)


@dataclass
class Figures:
    """Everything the page shows but samples."""

    stages: list[StageFigures]
    sources: list[str]
    histograms: list[Histogram] = field(default_factory=list)

    def kept(self, stage: StageFigures, source: str) -> int:
        """How many records of a source a stage kept; small sources go by the name ``other``."""
        if source == OTHER and OTHER in self.sources:
            return sum(count for name, count in stage.counts.kept.items() if name not in self.sources[:-1])
        return stage.counts.kept[source]


def stage_folders(run: Path) -> list[Path]:
    """The folders of a run that stages wrote, in order of their names (``1-standardize``, ``2-generate``, ...)."""
    return sorted((path.parent for path in Path(run).glob(f"*/{STAGE_FILE}")), key=_number)


def _number(folder: Path) -> tuple[int, str]:
    number = folder.name.partition("-")[0]
    return (int(number) if number.isdigit() else 1 << 30, folder.name)


def collect(run: Path) -> Figures:
    """The figures of a run.

    Raises:
        ValueError: if no stage has written anything there.
    """
    folders = stage_folders(run)
    if not folders:
        raise ValueError(f"{run}: holds no output of a stage: run `r4b curate run` first, or name its --run folder")
    stages = []
    for folder in folders:
        about = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
        finished = len(list(folder.glob("part-*.json")))
        stages.append(StageFigures(about["stage"], folder, folder_counts(folder), finished, len(about["partitions"])))
    total: Counter[str] = Counter()
    for stage in stages:
        total |= stage.counts.kept
    sources = [name for name, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]
    if len(sources) > MAX_SOURCES:
        sources = [*sources[: MAX_SOURCES - 1], OTHER]
    return Figures(stages, sources, _histograms(stages))


def _histograms(stages: Sequence[StageFigures]) -> list[Histogram]:
    """Lengths and pass rates, each of the last stage before `select` cuts by them."""
    scored = _last(stages, lambda stage: stage.name != "select")
    if scored is None:
        return []
    tokens: Counter[int] = Counter()
    rates: Counter[tuple[int, int]] = Counter()
    verdicts: Counter[str] = Counter()
    without_tokens = without_rate = 0
    for path in sorted(scored.folder.glob("part-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["response_tokens", "tries", "right", "verdict"]):
            columns = batch.to_pydict()
            for length in columns["response_tokens"]:
                if length is None:
                    without_tokens += 1
                else:
                    tokens[length] += 1
            for tries, right in zip(columns["tries"], columns["right"], strict=True):
                if tries and right is not None:
                    rates[right, tries] += 1
                else:
                    without_rate += 1
            verdicts.update(verdict or "not verified" for verdict in columns["verdict"])
    found = []
    if tokens:
        found.append(_lengths(tokens, without_tokens))
    if rates:
        found.append(_pass_rates(rates, without_rate))
    if len(verdicts) > 1:
        bars = [Bar(name, verdicts[name]) for name in ("right", "wrong", "undecided", "not verified") if verdicts[name]]
        found.append(Histogram("Verdicts", "on the teacher's answers that were kept", bars))
    return found


def _last(stages: Sequence[StageFigures], wanted: Callable[[StageFigures], bool]) -> StageFigures | None:
    return next((stage for stage in reversed(stages) if wanted(stage)), None)


def _lengths(tokens: Counter[int], missing: int) -> Histogram:
    """Equal steps from the 1st to the 99th percentile; the first and the last bar take the rest."""
    ordered = sorted(tokens)
    low, high = (_quantile(tokens, ordered, share) for share in (0.01, 0.99))
    step = _round_up(max(1, -(-(high - low + 1) // _LENGTH_BARS)))
    first = 0 if low < high / 8 else low // step
    count = high // step + 1 - first
    bars = [0] * (count + 1)
    for length, number in tokens.items():
        bars[min(max(length // step - first, 0), count)] += number
    labels = [str((first + i) * step) for i in range(count)] + [f"≥ {(first + count) * step}"]
    mean = sum(length * number for length, number in tokens.items()) / tokens.total()
    note = f"tokens; mean {mean:,.0f}, median {_quantile(tokens, ordered, 0.5):,}, longest {ordered[-1]:,}"
    found = [Bar(label, number) for label, number in zip(labels, bars, strict=True)]
    return Histogram("Length of responses", note, found if found[-1].count else found[:-1], missing)


def _quantile(counts: Counter[int], ordered: Sequence[int], share: float) -> int:
    wanted, seen = share * counts.total(), 0
    for value in ordered:
        seen += counts[value]
        if seen >= wanted:
            return value
    return ordered[-1]


def _round_up(step: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        for digit in (1, 2, 5):
            if digit * size >= step:
                return digit * size
        size *= 10


def _pass_rates(rates: Counter[tuple[int, int]], missing: int) -> Histogram:
    """One bar for each number of right answers among as many tries as most records have."""
    by_tries: Counter[int] = Counter()
    for (_, tries), count in rates.items():
        by_tries[tries] += count
    usual = max(by_tries, key=lambda tries: (by_tries[tries], tries))
    bars = [Bar(f"{right}/{usual}", rates[right, usual]) for right in range(usual + 1)]
    mean = sum(count * right / tries for (right, tries), count in rates.items()) / rates.total()
    note = f"right answers among the judged tries; mean {mean:.2f}"
    if others := by_tries.total() - by_tries[usual]:
        note += f"; {others:,} with another number of tries"
    return Histogram("Pass rate of the student", note, bars, missing)
