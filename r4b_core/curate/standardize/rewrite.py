"""Cleaning by a language model of what rules cannot mend: translation, weak instructions (MMFineReason, Table 11)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from r4b_core.config.recipe import Settings
from r4b_core.curate.asking import AskStage, AskWork
from r4b_core.curate.client import Answer, Background, ChatClient, ChatRequest, open_client, window_of
from r4b_core.curate.journal import Journal
from r4b_core.curate.runner import run_stage
from r4b_core.curate.stage import Drop, Outcome
from r4b_core.curate.store import open_stage, partitions_of
from r4b_core.curate.templates import load_template
from r4b_core.curate.wire import Prompt, ServedModel
from r4b_core.data.records import Record
from r4b_core.modes import IMAGE, THINK_CLOSE

NO_PROBLEM = "NO PROBLEM"
NO_ANSWER = "no_checkable_answer"
ERRORS = ("language", "link", "watermark", "numbering", "score", "instruction", NO_ANSWER)
_MARK = "[image]"


class RewriteSettings(Settings):
    """The model that cleans questions after the rules; without endpoints there is none."""

    cleaner: ServedModel = ServedModel(model="Qwen/Qwen3-30B-A3B-Thinking-2507", temperature=0.0, max_tokens=8192)
    template: str = Field("clean", description="a template that ships, or a file of your own")

    @property
    def content(self) -> dict[str, Any]:
        """What the output depends on."""
        template = load_template(self.template)
        return {"cleaner": self.cleaner.content, "template": [template.name, template.digest]}


@dataclass(frozen=True, slots=True)
class Finding:
    """What the model says of a question.

    Attributes:
        error: one of ``ERRORS``, or "" for no problem.
        corrected: the question without it; None where there is nothing to correct.
    """

    error: str = ""
    corrected: str | None = None


def read_finding(text: str) -> Finding | None:
    """A reply that is exactly one of the two that the prompt allows; None for any other."""
    said = text.rpartition(THINK_CLOSE)[2].strip()
    if said == NO_PROBLEM:
        return Finding()
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"error_type", "corrected"} or value["error_type"] not in ERRORS:
        return None
    error, corrected = value["error_type"], value["corrected"]
    if error == NO_ANSWER:
        return Finding(error) if corrected is None else None
    return Finding(error, corrected) if isinstance(corrected, str) and corrected.strip() else None


class Rewrite(AskStage[Answer]):
    """Asks the cleaner about every question. One that it does not answer as it was told stays as the rules left it."""

    name = "rewrite"

    def __init__(self, settings: RewriteSettings, background: Background, cleaner: ChatClient) -> None:
        self.background, self.window = background, window_of(settings.cleaner)
        self._cleaner, self._template = cleaner, load_template(settings.template)

    async def ask(self, record: Record) -> Answer:
        shown = record.question.replace(IMAGE, _MARK)
        if record.answer or record.original_answer:
            shown += f"\n\nReference answer: {record.answer or record.original_answer}"
        return await self._cleaner.ask(ChatRequest(self.name, record.key, Prompt(self._template, shown, []), seed=0))

    def settle(self, asked: Sequence[tuple[Record, Answer]]) -> Outcome:
        outcome = Outcome()
        for record, answer in asked:
            finding = read_finding(answer.text) if answer.whole else None
            if finding is None:
                outcome.kept.append(_noted(record, f"none: {answer.failure or 'the reply is not as it was asked for'}"))
            elif finding.error == NO_ANSWER:
                place = record.provenance["file"], int(record.provenance["row"])
                said = "as the cleaner says"
                outcome.dropped.append(Drop(record.id, record.source, "no checkable answer", said, False, *place))
            elif finding.corrected is None:
                outcome.kept.append(_noted(record, "no problem"))
            else:
                outcome.kept.append(_corrected(record, finding))
        return outcome


@dataclass(frozen=True)
class Rewriting:
    """The pass over a folder of records, in one process: the endpoint does the work."""

    settings: RewriteSettings

    @property
    def content(self) -> dict[str, Any]:
        return self.settings.content

    def __call__(self, source: Path, target: Path, journal: Path) -> None:
        """From the records in ``source`` to those in ``target``; the replies stay in the folder ``journal``."""
        with open_stage(target, Rewrite.name, self.content, partitions_of(source)) as store:
            run_stage(store, AskWork(_open, self.settings, journal, tuple(store.pending())), 0)


@contextmanager
def _open(settings: RewriteSettings, background: Background, journal: Journal) -> Iterator[Rewrite]:
    with open_client(settings.cleaner, "rewrite.cleaner", background, journal) as cleaner:
        yield Rewrite(settings, background, cleaner)


def _corrected(record: Record, finding: Finding) -> Record:
    question = (finding.corrected or "").replace(IMAGE, "").replace(_MARK, IMAGE)
    if question.count(IMAGE) != record.question.count(IMAGE):
        return _noted(record, f"none: another number of {IMAGE} marks")
    return _noted(replace(record, question=question), finding.error)


def _noted(record: Record, note: str) -> Record:
    return replace(record, provenance=record.provenance | {"rewrite": note})
