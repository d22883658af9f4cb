"""verify: keeps the records whose response has the right form and the right answer (MMFineReason 3.3).

Form first, because it is cheap; then the answer by rules, by math-verify in killable processes, and, where neither can
tell, by a judge if there is one. What nobody could decide is dropped under a reason of its own or kept as undecided,
but never counted as right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from r4b_core.config.recipe import Settings
from r4b_core.curate.stage import Outcome
from r4b_core.curate.verify.judge import Judge, JudgeRequest, judge_prompt, read_judgement
from r4b_core.curate.verify.repetition import repeated
from r4b_core.curate.verify.template import TemplateSettings, split_response, template_fault
from r4b_core.data.records import Record
from r4b_core.rewards.answer import Extraction, find_answer
from r4b_core.rewards.choices import read_options
from r4b_core.rewards.verdict import Outcome as Judged
from r4b_core.rewards.verdict import Verdict, undecided
from r4b_core.rewards.verify import Verifier


class VerifySettings(Settings):
    """What is kept."""

    template: TemplateSettings = TemplateSettings()
    ngram: int = Field(50, ge=1, description="words of the pieces whose repetition in the reasoning is counted")
    max_repeats: int = Field(3, ge=2, description="a piece that occurs this often drops the record")
    wrong: Literal["drop", "keep"] = Field("drop", description="records with a wrong answer")
    undecided: Literal["drop", "keep"] = Field("drop", description="records whose answer nobody could decide")
    workers: int = Field(1, ge=1, description="processes for the mathematics that the rules leave over")
    timeout_s: float = Field(3.0, gt=0, description="for one answer; then it is undecided")
    memory_mb: int = Field(1024, ge=256, description="address space of such a process")

    @property
    def content(self) -> dict[str, Any]:
        """What the output depends on: not how many processes there are."""
        return self.model_dump(mode="json", exclude={"workers"})


@dataclass(frozen=True)
class _Finding:
    """A record whose form is right, the answer in its response, and what is known about it."""

    record: Record
    found: Extraction
    verdict: Verdict | None = None


def verify_batch(
    records: Sequence[Record], settings: VerifySettings, verifier: Verifier, judge: Judge | None = None
) -> Outcome:
    """Every record, kept with ``extracted``, ``verdict`` and ``verdict_reason``, or dropped with a reason.

    Args:
        judge: decides what the rules leave undecided; asked once for the whole batch.
    """
    outcome = Outcome()
    findings = []
    for record in records:
        if fault := form_fault(record, settings):
            outcome.drop(record, *fault)
        else:
            findings.append(_Finding(record, _find(record)))
    findings = _by_rules(findings, verifier)
    if judge is not None:
        findings = _by_judge(findings, judge)
    for finding in findings:
        _settle(finding, settings, outcome)
    return outcome


def form_fault(record: Record, settings: VerifySettings) -> tuple[str, str] | None:
    """(constant reason, detail) of what is wrong with the form of a record's response."""
    if fault := template_fault(record, settings.template):
        return fault
    reasoning, _ = split_response(record.response or "") or ("", "")
    if gram := repeated(reasoning.split(), settings.ngram, settings.max_repeats):
        return "repetition", f"{settings.max_repeats} times or more: {' '.join(gram[:12])} ..."
    return None


def _find(record: Record) -> Extraction:
    parts = split_response(record.response or "")
    return find_answer(parts[1], read_options(record.question)) if parts else Extraction(None, "no answer found")


def _by_rules(findings: list[_Finding], verifier: Verifier) -> list[_Finding]:
    """Verdicts by the rules and math-verify. Without an answer or a reference there is nothing to compare."""
    asked = [
        (finding, finding.found.answer, finding.record.answer)
        for finding in findings
        if finding.found.answer is not None and (finding.record.answer or "").strip()
    ]
    verdicts = iter(
        verifier.verify_many(
            [(answer or "", gold or "") for _, answer, gold in asked],
            [finding.record.question for finding, _, _ in asked],
        )
    )
    comparable = {id(finding) for finding, _, _ in asked}
    return [
        replace(finding, verdict=next(verdicts) if id(finding) in comparable else _incomparable(finding))
        for finding in findings
    ]


def _incomparable(finding: _Finding) -> Verdict:
    return undecided("no reference answer" if finding.found.answer is not None else finding.found.reason)


def _by_judge(findings: list[_Finding], judge: Judge) -> list[_Finding]:
    """Ask about every comparable pair that is undecided."""
    requests: dict[int, JudgeRequest] = {}
    for index, finding in enumerate(findings):
        record, answer = finding.record, finding.found.answer
        open_case = finding.verdict is not None and finding.verdict.outcome is Judged.UNDECIDED
        if open_case and answer and (record.answer or "").strip():
            prompt = judge_prompt(record.question, record.answer or "", answer)
            if prompt is not None:
                requests[index] = JudgeRequest(record.key, prompt)
    replies = judge(list(requests.values())) if requests else []
    judged = dict(zip(requests, map(read_judgement, replies), strict=True))
    return [replace(finding, verdict=judged.get(index, finding.verdict)) for index, finding in enumerate(findings)]


def _settle(finding: _Finding, settings: VerifySettings, outcome: Outcome) -> None:
    verdict = finding.verdict
    assert verdict is not None
    record = replace(
        finding.record,
        extracted=finding.found.answer,
        verdict=str(verdict.outcome),
        verdict_reason=verdict.reason,
    )
    detail = f"{verdict.reason}: {_short(finding.found.answer)} for {_short(record.answer)}"
    if verdict.outcome is Judged.WRONG and settings.wrong == "drop":
        outcome.drop(record, "wrong answer", detail)
    elif verdict.outcome is Judged.UNDECIDED and settings.undecided == "drop":
        outcome.drop(record, "undecided", detail)
    else:
        outcome.kept.append(record)


def _short(text: str | None) -> str:
    return "none" if text is None else repr(text if len(text) <= 60 else text[:57] + "...")


class Verify:
    """The stage with its verifier, and its judge if there is one."""

    name = "verify"

    def __init__(self, settings: VerifySettings, verifier: Verifier, judge: Judge | None = None) -> None:
        self.settings, self._verifier, self._judge = settings, verifier, judge

    def __call__(self, records: Sequence[Record]) -> Outcome:
        return verify_batch(records, self.settings, self._verifier, self._judge)


@contextmanager
def open_verify(settings: VerifySettings, judge: Judge | None = None) -> Iterator[Verify]:
    """The stage with its processes; they end with the context."""
    with Verifier(settings.workers, settings.timeout_s, settings.memory_mb) as verifier:
        yield Verify(settings, verifier, judge)
