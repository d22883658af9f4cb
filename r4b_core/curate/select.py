"""Choosing by difficulty: pass-rate bands, quotas, a token budget, mixing, and R-4B's rules for the mode.

MMFineReason (section 3.3) keeps by pass rate: 0 of 4 makes its 123K set, anything but 4 of 4 its 586K set. R-4B
(section 2.1) makes bi-mode annealing data of the same scores. What is chosen depends on the seed and the records'
keys, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from r4b_core.config.recipe import Band, Settings
from r4b_core.curate.runner import Advance, Process, Work
from r4b_core.curate.stage import Outcome
from r4b_core.curate.standardize.formats import WORD
from r4b_core.curate.store import (
    Counts,
    Partition,
    PartitionWriter,
    StageError,
    StageStore,
    open_stage,
    partitions_of,
)
from r4b_core.data.annotate import objective_rule
from r4b_core.data.records import Record, read_records
from r4b_core.modes import FORCED_TEXT, THINK_CLOSE, THINK_OPEN, Mode

PRESETS: dict[str, dict[str, Any]] = {
    "mmfr-123k": {"pass_rate": "[0, 0]", "min_tries": 4, "modes": "thinking"},
    "mmfr-586k": {"pass_rate": "[0, 1)", "min_tries": 4, "modes": "thinking"},
}


class GeneralSettings(Settings):
    """Other data to mix in, so that a hard selection does not lose what is easy."""

    folder: str | None = Field(None, description="of records: a stage's output, or Parquet files of the same schema")
    share: float | None = Field(None, gt=0, lt=1, description="of the whole result")
    count: int | None = Field(None, ge=1, description="records, at most")

    @model_validator(mode="after")
    def _share_or_count(self) -> GeneralSettings:
        if self.folder is not None and (self.share is None) == (self.count is None):
            raise ValueError("general.folder needs either general.share or general.count")
        if self.folder is None and (self.share or self.count):
            raise ValueError("general.share and general.count need general.folder")
        return self


class SelectSettings(Settings):
    """What is kept of scored records."""

    preset: Literal["mmfr-123k", "mmfr-586k"] | None = Field(None, description="MMFineReason's two published sets")
    pass_rate: str | None = Field(None, description='interval such as "[0, 1)": [ ] take the end in, ( ) leave it out')
    min_tries: int = Field(4, ge=1, description="judged tries without which a pass rate says nothing")
    modes: Literal["keep", "thinking", "r4b"] = Field(
        "keep", description="mode of a record: as it is; thinking for all; by R-4B's rules"
    )
    quotas: dict[str, int] = Field(default_factory=dict, description='records of a source, at most; "*": of any other')
    target_tokens: int | None = Field(None, ge=1, description="tokens of all responses together, at most")
    general: GeneralSettings = GeneralSettings()

    @field_validator("pass_rate")
    @classmethod
    def _is_interval(cls, text: str | None) -> str | None:
        if text is not None:
            Band.parse(text)
        return text

    @field_validator("quotas")
    @classmethod
    def _quotas_are_counts(cls, quotas: dict[str, int]) -> dict[str, int]:
        if negative := {source: quota for source, quota in quotas.items() if quota < 0}:
            raise ValueError(f"a quota is a count of records, not {negative}")
        return quotas


KEPT = ""
FEW_TRIES = "too few judged tries"
OUTSIDE = "pass rate outside the band"
UNCLEAR = "annotator's word unclear"
NO_THINKING = "no thinking response"
NO_ANSWER = "no answer for a direct response"
WRONG = "wrong response"
OVER_QUOTA = "over the quota of its source"
OVER_TOKENS = "over target_tokens"
GENERAL_TWICE = "general record already selected"
GENERAL_REST = "general record not needed"
REASONS = (
    *(KEPT, FEW_TRIES, OUTSIDE, UNCLEAR, NO_THINKING, NO_ANSWER, WRONG),
    *(OVER_QUOTA, OVER_TOKENS, GENERAL_TWICE, GENERAL_REST),
)
MODES = (None, Mode.THINKING, Mode.DIRECT)
CHARACTERS_PER_TOKEN = 4  # where nobody counted the tokens of a response
BATCH = 64
_COLUMNS = ("id", "source", "tries", "right", "answer", "response", "response_tokens", "verdict", "provenance")
DECISION = np.dtype([("reason", "u1"), ("mode", "u1")])


def judge(record: Record, settings: SelectSettings) -> tuple[str, Mode | None]:
    """(why a record is not kept, or ""; the mode that a rule gives it, or None) by what it says itself."""
    if settings.pass_rate is not None:
        rate = record.pass_rate
        if rate is None or (record.tries or 0) < settings.min_tries:
            return FEW_TRIES, None
        if not Band.parse(settings.pass_rate).holds(rate):
            return OUTSIDE, None
    if settings.modes == "keep":
        return KEPT, None
    mode = Mode.THINKING
    if settings.modes == "r4b":
        reason, mode = r4b_mode(record, settings.min_tries)
        if reason:
            return reason, None
    if mode is Mode.THINKING:
        if record.verdict == "wrong":
            return WRONG, None
        return (KEPT, mode) if thinking_response(record.response) else (NO_THINKING, None)
    return (KEPT, mode) if (record.answer or "").strip() else (NO_ANSWER, None)


def r4b_mode(record: Record, min_tries: int) -> tuple[str, Mode]:
    """R-4B's two rules: an annotator's word where the question is open, else whether any of k tries was right."""
    if (word := record.provenance.get(WORD)) is not None:
        said = {"yes": Mode.THINKING, "no": Mode.DIRECT}.get(word.strip().strip(".").casefold())
        return (UNCLEAR, Mode.AUTO) if said is None else (KEPT, said)
    if record.right is None or (record.tries or 0) < min_tries:
        return FEW_TRIES, Mode.AUTO
    return KEPT, objective_rule(record.right)


def in_mode(record: Record, mode: Mode | None) -> Record:
    """The record with the response of a mode: the teacher's, or the reference answer at once."""
    if mode is Mode.THINKING:
        return replace(record, mode=str(mode), response=thinking_response(record.response))
    if mode is Mode.DIRECT:
        opening = THINK_OPEN + "".join(FORCED_TEXT[Mode.DIRECT])
        notes = {} if record.finish_reason is None else {"direct": "the reference answer, not the teacher's response"}
        return replace(
            record,
            mode=str(mode),
            response=opening + (record.answer or "").strip(),
            response_tokens=None,
            finish_reason=None,
            provenance=record.provenance | notes,
        )
    return record


def thinking_response(response: str | None) -> str | None:
    """A response with its reasoning, opened as the mode wants it; None where there is no whole reasoning."""
    if response is None or not response.lstrip().startswith(THINK_OPEN):
        return None
    body = response.lstrip().removeprefix(THINK_OPEN).lstrip()
    reasoning, close, _ = body.partition(THINK_CLOSE)
    if not close or not reasoning.strip():
        return None
    return THINK_OPEN + "".join(FORCED_TEXT[Mode.THINKING]) + body


@dataclass
class Candidates:
    """What choosing looks at, one element per record in order.

    Attributes:
        reason: index into ``REASONS``.
        mode: index into ``MODES``.
        source: index into ``sources``.
        rank: of the record in a shuffle that the seed and its key decide; also tells records apart.
        tokens: of its response.
    """

    reason: NDArray[np.uint8]
    mode: NDArray[np.uint8]
    source: NDArray[np.int32]
    rank: NDArray[np.uint64]
    tokens: NDArray[np.int64]
    sources: list[str]


def choose(found: Candidates, general: slice, settings: SelectSettings) -> None:
    """Mark in ``found.reason`` what is let go for the sake of the whole: quotas, then tokens, then the mix.

    Args:
        general: the places of the records to mix in, behind all others.

    Raises:
        StageError: there is not enough general data for its share.
    """
    reason = found.reason
    own = np.arange(len(reason)) < general.start
    for index, source in enumerate(found.sources):
        quota = settings.quotas.get(source, settings.quotas.get("*"))
        if quota is not None:
            _keep_first(found, (found.source == index) & own, quota, OVER_QUOTA)
    if settings.target_tokens is not None:
        left = _in_order(found, own)
        within = int(np.searchsorted(np.cumsum(found.tokens[left]), settings.target_tokens, "right"))
        reason[left[within:]] = REASONS.index(OVER_TOKENS)
    if general.start == general.stop:
        return
    selected = found.rank[own & (reason == 0)]
    twice = ~own & (reason == 0) & np.isin(found.rank, selected)
    reason[twice] = REASONS.index(GENERAL_TWICE)
    wanted = settings.general.count
    if settings.general.share is not None:
        wanted = round(len(selected) * settings.general.share / (1 - settings.general.share))
        there = int((~own & (reason == 0)).sum())
        if there < wanted:
            raise StageError(
                f"select.general.share = {settings.general.share}: takes {wanted} records beside {len(selected)} "
                f"selected ones, {settings.general.folder} has {there}: lower it, or give more general data"
            )
    _keep_first(found, ~own, wanted or 0, GENERAL_REST)


def _in_order(found: Candidates, among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The places of those still kept, in the order of the shuffle."""
    left = np.flatnonzero(among & (found.reason == 0))
    return left[np.lexsort((left, found.rank[left]))]


def _keep_first(found: Candidates, among: NDArray[np.bool_], count: int, reason: str) -> None:
    found.reason[_in_order(found, among)[count:]] = REASONS.index(reason)


def select(
    folder: str | Path,
    source: str | Path,
    settings: SelectSettings,
    seed: int,
    run: Callable[[StageStore, Work, Advance], None],
    advance: Advance = lambda n: None,
    *,
    force: bool = False,
) -> Counts:
    """Choose from the records of a folder.

    Args:
        folder: the stage's output.
        source: the folder of scored records.
        run: does the partitions of a store with a work.

    Raises:
        StageError: there is too little general data, or see `open_stage`.
    """
    folder = Path(folder)
    own = partitions_of(source)
    general = partitions_of(settings.general.folder, len(own)) if settings.general.folder else []
    partitions = [*own, *general]
    asked = {**settings.model_dump(mode="json"), "seed": seed}
    choice = folder / "choice"
    with open_stage(folder, "select", asked, partitions, force=force) as store:
        if store.pending():
            found, sizes = look_at(partitions, len(own), settings, seed)
            choose(found, slice(sum(sizes[: len(own)]), sum(sizes)), settings)
            choice.mkdir(exist_ok=True)
            decisions = np.zeros(len(found.reason), DECISION)
            decisions["reason"], decisions["mode"] = found.reason, found.mode
            ends = np.cumsum(sizes)
            for partition, end, size in zip(partitions, ends, sizes, strict=True):
                np.save(choice / f"{partition.name}.npy", decisions[end - size : end])
            run(store, ChoiceWork(choice), advance)
        shutil.rmtree(choice, ignore_errors=True)
        return store.counts()


def look_at(
    partitions: Sequence[Partition], num_own: int, settings: SelectSettings, seed: int
) -> tuple[Candidates, list[int]]:
    """Every record judged by itself, without its images, and the number of records in each partition."""
    sources: dict[str, int] = {}
    columns: list[list[NDArray]] = []
    keep_all = SelectSettings(modes="keep")
    for partition in partitions:
        rules = settings if partition.index < num_own else keep_all
        rows = [_look(record, rules, sources, seed) for record in _without_images(partition)]
        kinds = (np.uint8, np.uint8, np.int32, np.uint64, np.int64)
        columns.append([np.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds)])
    empty = [np.zeros(0, kind) for kind in (np.uint8, np.uint8, np.int32, np.uint64, np.int64)]
    reason, mode, source, rank, tokens = (np.concatenate(parts) for parts in zip(empty, *columns, strict=True))
    found = Candidates(reason, mode, source, rank, tokens, list(sources))
    return found, [len(part[0]) for part in columns]


def _look(record: Record, settings: SelectSettings, sources: dict[str, int], seed: int) -> tuple[int, ...]:
    reason, mode = judge(record, settings)
    made = record if reason else in_mode(record, mode)
    tokens = made.response_tokens
    if tokens is None:
        tokens = math.ceil(len(made.response or "") / CHARACTERS_PER_TOKEN)
    digest = hashlib.blake2b(f"{seed}\0{record.source}\0{record.id}".encode(), digest_size=8).digest()
    source = sources.setdefault(record.source, len(sources))
    return REASONS.index(reason), MODES.index(mode), source, int.from_bytes(digest, "little"), tokens


def _without_images(partition: Partition) -> Iterator[Record]:
    """The records of a partition, read without their images."""
    with pq.ParquetFile(partition.path) as file:
        for batch in file.iter_batches(BATCH, columns=list(_COLUMNS)):
            for row in batch.to_pylist():
                notes = json.loads(row.pop("provenance") or "{}")
                yield Record(**row, question="", provenance=notes)


@dataclass(frozen=True)
class ChoiceWork:
    """Writes what was chosen, each record in its mode.

    Attributes:
        folder: of the decisions.
    """

    folder: Path

    @contextmanager
    def open(self) -> Iterator[Process]:
        yield self._process

    def _process(self, partition: Partition, writer: PartitionWriter) -> Iterator[None]:
        decisions = np.load(self.folder / f"{partition.name}.npy")
        records = read_records(partition.path)
        for start in range(0, len(decisions), BATCH):
            outcome = Outcome()
            batch = list(islice(records, min(BATCH, len(decisions) - start)))
            for record, decision in zip(batch, decisions[start:], strict=False):
                if reason := REASONS[int(decision["reason"])]:
                    outcome.drop(record, reason, _detail(record))
                else:
                    outcome.kept.append(in_mode(record, MODES[int(decision["mode"])]))
            writer.add(len(batch), outcome)
            yield


def _detail(record: Record) -> str:
    return f"{record.right} of {record.tries} right"
