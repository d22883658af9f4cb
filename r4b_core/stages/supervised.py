"""SFT on records: what pre-training, annealing and distillation have in common."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from r4b_core.config.recipe import AnnealConfig, DistillConfig, PretrainConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import usable_capacity
from r4b_core.data.stream import Bad, Planner, RecordStream, Step, StreamError, joined
from r4b_core.losses.heads import sft_head
from r4b_core.parallel.learner import LossFn
from r4b_core.stages.job import Job, Stage, mean_metrics, packing
from r4b_core.stages.source import Records, Tally, agreed

SupervisedConfig = PretrainConfig | AnnealConfig | DistillConfig


def train_on_records(
    job: Job,
    name: str,
    config: SupervisedConfig,
    head: LossFn = sft_head,
    *,
    teacher_slots: int = 0,
    prepare: Callable[[Stage, list[PackedBatch]], None] | None = None,
) -> None:
    """One stage of updates on packed sequences of records; what every stage of SFT on records is.

    Args:
        teacher_slots: K of the files' teacher columns that the head needs; 0: none.
        prepare: adds to the micro-batches what the head needs, before each update.
    """
    if config.steps == 0 or job.is_past(name):
        return
    stage = job.begin(name, config.optim, config.steps)
    if stage.done == config.steps:
        return
    with Feed(stage, config, teacher_slots) as feed:
        stage.keep("data", feed.state)
        for _ in stage.remaining():
            batches, values = feed.next()
            batches = [batch.to(job.runtime.device) for batch in batches]
            if prepare is not None:
                prepare(stage, batches)
            update(stage, batches, values, head, tokens=int(values["data/tokens"]))


def update(
    stage: Stage,
    batches: list[PackedBatch],
    values: dict[str, float] | None = None,
    head: LossFn = sft_head,
    tokens: int | None = None,
) -> None:
    """One SFT update and its line of metrics; ``tokens`` of all ranks, if not all those of the batches."""
    with stage.job.run.timeline("update"):
        result = stage.learner.step([batch.to(stage.job.runtime.device) for batch in batches], head)
    if tokens is None:
        tokens = sum(batch.num_tokens for batch in batches) * stage.job.runtime.dp
    stage.log(result, {**mean_metrics(result), **(values or {})}, tokens)


class Feed(AbstractContextManager["Feed"]):
    """This rank's packed sequences, step by step, and what all ranks found out about the data."""

    def __init__(self, stage: Stage, config: SupervisedConfig, teacher_slots: int = 0) -> None:
        job = stage.job
        source, recipe, ranks = job.source, job.recipe, job.runtime
        assert isinstance(source, Records) and source.train is not None, "the recipe is of boards"
        cut = packing(job)
        self._source, self._runtime = source, ranks
        self._sequences, self._capacity = config.batch_size, usable_capacity(**cut)
        before = stage.state.get("data", {})
        self._tally = Tally(recipe.data.max_bad_share, source.train.rows)
        if before:
            self._tally.restore(before["tally"])
        self._lanes: dict[str, Any] = before.get("lanes", {})
        self._met = sum(lane["met"] for lane in self._lanes.values())
        planner = Planner(
            job.processor,
            self._capacity,
            multiple=cut["multiple"],
            pad_to=cut["pad_to"],
            mask_empty_think=config.mask_empty_think,
            teacher_slots=teacher_slots,
            decoder=recipe.data.decoder,
            gpu=ranks.device.index if ranks.device.type == "cuda" else None,
        )
        self._stream = RecordStream(
            source.train,
            planner,
            lanes=config.batch_size,
            seed=(recipe.seed << 32) + zlib.crc32(stage.name.encode()),
            lookahead=recipe.data.lookahead,
            rank=ranks.dp_rank,
            ranks=ranks.dp,
            prefetch=recipe.data.prefetch,
            threads=recipe.data.threads,
            state=self._lanes or None,
        )

    def __enter__(self) -> Feed:
        self._stream.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stream.__exit__(*exception)

    def next(self) -> tuple[list[PackedBatch], dict[str, float]]:
        """The micro-batches of the next step, and the values to log with it. A collective of all ranks.

        Raises:
            ValueError: on every rank alike: the data cannot be read, or too much of it cannot be used.
        """
        started = time.perf_counter()
        step = agreed(self._runtime, self._take)
        waited = time.perf_counter() - started
        self._lanes = step.lanes
        part = {
            "tokens": step.tokens,
            "records": step.records,
            "thinking": step.thinking,
            "met": step.met,
            "epochs": step.epochs * len(step.lanes),
            "bad": step.bad,
        }
        parts = self._runtime.gather(part, self._runtime.dp_group)
        total = {name: sum(part[name] for part in parts) for name in part if name != "bad"}
        bad = [Bad(*record) for part in parts for record in part["bad"]]
        self._source.set_aside(bad)
        self._tally.add(total["met"] - self._met, bad)
        self._met = total["met"]
        values = {
            "data/fill": total["tokens"] / (self._sequences * self._capacity),
            "data/epoch": total["epochs"] / self._sequences,
            "data/tokens": total["tokens"],
            "data/records": total["records"],
            "data/thinking_share": total["thinking"] / max(total["records"], 1),
            "data/quarantined": self._tally.total,
            "perf/data_wait_s": round(waited, 4),
        }
        return step.batches, values

    def _take(self) -> Step:
        try:
            return self._stream.next()
        except StreamError as error:
            self._source.set_aside(error.bad)
            raise

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the step that was taken last. A collective of all ranks."""
        lanes = joined(self._runtime.gather(self._lanes, self._runtime.dp_group))
        return {"lanes": lanes, "tally": self._tally.state}
