"""generate: a teacher solves every question, and describes the image where that is asked for (MMFineReason 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from r4b_core.config.recipe import Settings
from r4b_core.curate.asking import AskStage
from r4b_core.curate.client import Answer, Background, ChatClient, ChatRequest, open_client, seed_of, window_of
from r4b_core.curate.endpoints import Failure
from r4b_core.curate.journal import Journal
from r4b_core.curate.stage import Outcome
from r4b_core.curate.templates import Template, load_template
from r4b_core.curate.verify.repetition import repeated
from r4b_core.curate.wire import Prompt, ServedModel
from r4b_core.data.records import Record
from r4b_core.modes import THINK_CLOSE


class CaptionSettings(Settings):
    """The caption pass: its text is kept with the record and never shown to the teacher."""

    enabled: bool = False
    captioner: ServedModel = ServedModel(model="Qwen/Qwen3-VL-235B-A22B-Instruct")
    template: str = Field("caption", description="a template that ships, or a file of your own")


class GenerateSettings(Settings):
    """The teacher and what it is asked. Defaults are MMFineReason's."""

    teacher: ServedModel = ServedModel(model="Qwen/Qwen3-VL-235B-A22B-Thinking")
    template: str = Field("distill", description="a template that ships (distill, score, bare), or a file of your own")
    regenerate: int = Field(0, ge=0, description="more tries, each with its own seed, at a cut off or looping response")
    caption: CaptionSettings = CaptionSettings()
    seed: int = Field(0, ge=0)
    retry_refused: bool = Field(False, description="ask again what a server refused (400, 404, 422) in an earlier run")

    @property
    def content(self) -> dict[str, Any]:
        """What the output depends on: not where the models are served, nor how patiently they are asked."""
        caption: dict[str, Any] = {"enabled": self.caption.enabled}
        if self.caption.enabled:
            template = load_template(self.caption.template, asks=False)
            caption |= {"captioner": self.caption.captioner.content, "template": [template.name, template.digest]}
        template = load_template(self.template)
        content = {"teacher": self.teacher.content, "template": [template.name, template.digest]}
        return content | {"regenerate": self.regenerate, "caption": caption, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Said:
    """What the models said to a record: the response of which attempt, and the caption where one was asked for."""

    response: Answer
    seed: int
    attempts: int
    caption: Answer | None


class Generate(AskStage[Said]):
    """Asks the teacher, and the captioner; see `open_generate`."""

    name = "generate"

    def __init__(
        self, settings: GenerateSettings, background: Background, teacher: ChatClient, captioner: ChatClient | None
    ) -> None:
        self.settings, self.background = settings, background
        self.window = window_of(settings.teacher)
        self._teacher, self._captioner = teacher, captioner
        self._template = load_template(settings.template)
        self._caption = load_template(settings.caption.template, asks=False)

    async def ask(self, record: Record) -> Said:
        """The response, asked for again while it is cut off or looping and more tries are allowed; and the caption."""
        prompt = Prompt(self._template, record.question, record.images)
        kept: tuple[Answer, int] | None = None
        for attempt in range(1 + self.settings.regenerate):
            seed = seed_of(self.settings.seed, record.key, 0, attempt)
            answer = await self._teacher.ask(ChatRequest(self.name, record.key, prompt, seed, attempt=attempt))
            if kept is None or answer.failure is None:
                kept = answer, seed
            last = attempt == self.settings.regenerate
            if last or answer.failure is not None or (answer.whole and not loops(answer.text)):
                break
        assert kept is not None
        return Said(*kept, attempt + 1, await self._describe(record))

    def settle(self, asked: Sequence[tuple[Record, Said]]) -> Outcome:
        """Records with their responses; those without one are dropped for the class of the failure.

        A response that is not whole is kept with its finish_reason, for `verify` to count and drop.
        """
        outcome = Outcome()
        for record, said in asked:
            failure = said.response.failure
            if failure is None:
                outcome.kept.append(self._keep(record, said))
            else:
                unusable = failure is Failure.UNSENDABLE
                outcome.drop(record, str(failure), said.response.detail, quarantined=unusable)
        return outcome

    async def _describe(self, record: Record) -> Answer | None:
        if self._captioner is None or not record.images:
            return None
        prompt = Prompt(self._caption, "", record.images)
        seed = seed_of(self.settings.seed, record.key)
        return await self._captioner.ask(ChatRequest("caption", record.key, prompt, seed))

    def _keep(self, record: Record, said: Said) -> Record:
        notes = {
            "teacher": self.settings.teacher.model,
            "teacher_prompt": _label(self._template),
            "teacher_seed": str(said.seed),
            "teacher_attempts": str(said.attempts),
        }
        caption = record.caption
        if said.caption is not None:
            notes |= {"captioner": self.settings.caption.captioner.model, "caption_prompt": _label(self._caption)}
            if said.caption.whole:
                caption = said.caption.text.rpartition(THINK_CLOSE)[2].strip()
            else:
                notes["caption_missing"] = str(said.caption.failure or f"finish_reason {said.caption.finish_reason}")
        return replace(
            record,
            caption=caption,
            response=said.response.text,
            finish_reason=said.response.finish_reason,
            response_tokens=said.response.tokens,
            provenance=record.provenance | notes,
        )


@contextmanager
def open_generate(settings: GenerateSettings, background: Background, journal: Journal) -> Iterator[Generate]:
    """The stage with its clients.

    Raises:
        EndpointError: if a model has no endpoint.
        ValueError: if a template cannot be used.
    """
    load_template(settings.template)
    again = settings.retry_refused
    with ExitStack() as stack:
        teacher = stack.enter_context(
            open_client(settings.teacher, "generate.teacher", background, journal, retry_refused=again)
        )
        captioner = None
        if settings.caption.enabled:
            model = settings.caption.captioner
            captioner = stack.enter_context(
                open_client(model, "generate.caption.captioner", background, journal, retry_refused=again)
            )
        yield Generate(settings, background, teacher, captioner)


def loops(text: str) -> bool:
    """Whether the reasoning repeats itself by the rule of `verify` (MMFineReason 3.3)."""
    return repeated(text.partition(THINK_CLOSE)[0].split()) is not None


def _label(template: Template) -> str:
    return f"{template.name} {template.digest}"
