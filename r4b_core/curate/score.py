"""score: how hard a question is for a student, by k rollouts (MMFineReason 3.3: 4; R-4B's annealing data: 8)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from r4b_core.config.recipe import Settings
from r4b_core.curate.asking import AskStage
from r4b_core.curate.client import (
    Answer,
    Background,
    ChatClient,
    ChatMany,
    ChatRequest,
    open_client,
    seed_of,
    window_of,
)
from r4b_core.curate.journal import Journal
from r4b_core.curate.judging import judge_by
from r4b_core.curate.stage import Outcome
from r4b_core.curate.templates import load_template
from r4b_core.curate.verify.judge import Judge, JudgeRequest, judge_prompt, read_judgement
from r4b_core.curate.verify.template import split_response
from r4b_core.curate.wire import Prompt, ServedModel
from r4b_core.data.records import Record
from r4b_core.modes import THINK_CLOSE, THINK_OPEN
from r4b_core.rewards.answer import find_answer
from r4b_core.rewards.choices import read_options
from r4b_core.rewards.verdict import Outcome as Judged
from r4b_core.rewards.verdict import Verdict
from r4b_core.rewards.verify import Verifier

Decide = Callable[[Sequence[tuple[Record, str]]], list[Verdict]]
"""Verdicts on (record, answer) pairs, in order."""


class ScoreSettings(Settings):
    """The student, how often it tries, and how its tries are judged."""

    student: ServedModel = ServedModel(model="Qwen/Qwen3-VL-4B-Thinking")
    template: str = Field("score", description="a template that ships (score, distill, bare), or a file of your own")
    k: int = Field(4, ge=1, description="rollouts per record")
    truncated: Literal["wrong", "missing"] = Field(
        "wrong", description="what a rollout counts as that used up student.max_tokens"
    )
    seed: int = Field(0, ge=0)
    verify_workers: int = Field(1, ge=1, description="processes that compare answers")
    verify_timeout_s: float = Field(5.0, gt=0, description="for one answer; then it is undecided")
    retry_refused: bool = Field(False, description="ask again what a server refused (400, 404, 422) in an earlier run")

    @property
    def content(self) -> dict[str, Any]:
        """What the output depends on: not where the student is served, nor how patiently it is asked."""
        template = load_template(self.template)
        rest = self.model_dump(mode="json", include={"k", "truncated", "seed", "verify_timeout_s"})
        return {"student": self.student.content, "template": [template.name, template.digest], **rest}


class Score(AskStage[list[Answer]]):
    """Counts how many of a student's answers are right; see `open_score`. It drops nothing."""

    name = "score"

    def __init__(self, settings: ScoreSettings, background: Background, student: ChatClient, decide: Decide) -> None:
        self.settings, self.background = settings, background
        self.window = -(-window_of(settings.student) // settings.k)
        self._student, self._decide = student, decide
        self._template = load_template(settings.template)

    async def ask(self, record: Record) -> list[Answer]:
        """k rollouts, each with a seed of its own; none where nothing is there to judge them by."""
        if not (record.answer or "").strip():
            return []
        prompt = Prompt(self._template, record.question, record.images)
        seeds = [seed_of(self.settings.seed, record.key, k) for k in range(self.settings.k)]
        requests = (ChatRequest(self.name, record.key, prompt, seed, k) for k, seed in enumerate(seeds))
        return list(await asyncio.gather(*(self._student.ask(request) for request in requests)))

    def settle(self, asked: Sequence[tuple[Record, list[Answer]]]) -> Outcome:
        """All records, with ``tries`` and ``right``: only rollouts that were decided count."""
        found = [[self._find(record, answer) for answer in answers] for record, answers in asked]
        pairs = [
            (record, text) for (record, _), row in zip(asked, found, strict=True) for text, _ in row if text is not None
        ]
        verdicts = iter(self._decide(pairs))
        outcome = Outcome()
        for (record, answers), row in zip(asked, found, strict=True):
            judged = [_of(next(verdicts)) if text is not None else without for text, without in row]
            outcome.kept.append(self._count(record, judged, has_reference=bool(answers)))
        return outcome

    def _find(self, record: Record, answer: Answer) -> tuple[str | None, str]:
        """(the answer in a rollout, or None and what the rollout counts as without one).

        A rollout that says nothing, or never ends its reasoning, is wrong; where something is said and no answer is
        found in it, nobody can tell.
        """
        if answer.failure is not None:
            return None, str(answer.failure)
        if answer.finish_reason == "length":
            return None, "wrong" if self.settings.truncated == "wrong" else "truncated"
        if not answer.whole:
            return None, f"finish_reason {answer.finish_reason}"
        reasons = THINK_OPEN in answer.text or THINK_CLOSE in answer.text
        parts = split_response(answer.text) if reasons else ("", answer.text)
        if parts is None or not parts[1].strip():
            return None, "wrong"
        return find_answer(parts[1], read_options(record.question)).answer, "undecided"

    def _count(self, record: Record, judged: Sequence[str], has_reference: bool) -> Record:
        counts = Counter(judged)
        right, wrong = counts.pop("right", 0), counts.pop("wrong", 0)
        notes = {
            "student": self.settings.student.model,
            "student_prompt": f"{self._template.name} {self._template.digest}",
            "student_seed": str(self.settings.seed),
            "student_rollouts": str(self.settings.k),
        }
        if counts:
            notes["student_missing"] = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
        elif not has_reference:
            notes["student_missing"] = "no reference answer"
        return replace(record, tries=right + wrong, right=right, provenance=record.provenance | notes)


@contextmanager
def open_score(
    settings: ScoreSettings, background: Background, journal: Journal, judge: ServedModel | None = None
) -> Iterator[Score]:
    """The stage with its clients.

    Args:
        judge: decides what the rules leave undecided, where it has endpoints.

    Raises:
        EndpointError: if the student has no endpoint.
        ValueError: if the template cannot be used.
    """
    load_template(settings.template)
    again = settings.retry_refused
    with ExitStack() as stack:
        student = stack.enter_context(
            open_client(settings.student, "score.student", background, journal, retry_refused=again)
        )
        asked = None
        if judge is not None and judge.endpoints:
            client = stack.enter_context(open_client(judge, "judge", background, journal, retry_refused=again))
            asked = judge_by(ChatMany(background, client))
        verifier = stack.enter_context(Verifier(settings.verify_workers, settings.verify_timeout_s))
        yield Score(settings, background, student, lambda pairs: decide(pairs, verifier, asked))


def decide(pairs: Sequence[tuple[Record, str]], verifier: Verifier, judge: Judge | None = None) -> list[Verdict]:
    """The verdict on each (record, answer): by the rules, and by the judge where these cannot tell."""
    compared = [(answer, record.answer or "") for record, answer in pairs]
    verdicts = verifier.verify_many(compared, [record.question for record, _ in pairs])
    if judge is None:
        return verdicts
    requests: dict[int, JudgeRequest] = {}
    for index, (record, answer) in enumerate(pairs):
        if verdicts[index].outcome is Judged.UNDECIDED:
            prompt = judge_prompt(record.question, record.answer or "", answer)
            if prompt is not None:
                requests[index] = JudgeRequest(record.key, prompt)
    once = list(dict.fromkeys(requests.values()))  # rollouts of a record may well say the same
    judged = dict(zip(once, map(read_judgement, judge(once) if once else ()), strict=True))
    return [judged[requests[index]] if index in requests else verdict for index, verdict in enumerate(verdicts)]


def _of(verdict: Verdict) -> str:
    return "undecided" if verdict.outcome is Judged.UNDECIDED else str(verdict.outcome)
