"""`r4b generate`: ask a model about pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r4b_core.modes import THINK_CLOSE, THINK_OPEN, Mode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from r4b_core.evaluate.generate import Answer, Decision, Event

_FOLDER = (
    "A run folder, one of its checkpoints, a folder of r4b convert, or a Hugging Face checkpoint (Qwen3-VL, R-4B)."
)


def generate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help=_FOLDER)] = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The same, by name.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A PNG, JPEG or WEBP file; may be given again.")] = None,
    prompt: Annotated[str, typer.Option(help="The question; <image> marks where images go, if not in front.")] = ...,
    mode: Annotated[Mode, typer.Option(help="Force a mode, or let the model decide.")] = Mode.AUTO,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the response at most. (default: the recipe's, or 2048)")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, no more.")] = False,
) -> None:
    """Answer a question about images: first how sure the model is that it should think, then the text as it comes."""
    if (run is None) == (model is None):
        raise ValueError("give the model's folder once: r4b generate RUN ..., or r4b generate --model DIR ...")
    from r4b_core.cli.output import console, is_main_rank
    from r4b_core.parallel import device

    device.activate()  # before anything imports Megatron-Core

    from r4b_core.evaluate.generate import Question, ask

    question = Question(prompt, tuple(image or ()), system, mode, max_new_tokens, temperature, top_p, seed)
    events = ask(run or model, question)
    if as_json:
        answer = _last(events)
        if is_main_rank():
            print(json.dumps(answer.as_json(), ensure_ascii=False), flush=True)
        return
    _show(events, console())


def _last(events: Iterator[Event]) -> Answer:
    *_, answer = events
    return answer


def _show(events: Iterator[Event], out: Console) -> None:
    from r4b_core.evaluate.generate import Answer, Decision, Loading, Piece

    writer = _Writer(out)
    for event in events:
        if isinstance(event, Loading):
            writer.loading(f"reading {event.weight_bytes / 1e6:,.0f} MB of weights from {event.path}")
        elif isinstance(event, Decision):
            writer.decision(event)
        elif isinstance(event, Piece):
            writer.text(event.text, event.reasoning)
        elif isinstance(event, Answer):
            writer.end(event)


class _Writer:
    """Prints the course of an answer as it comes; the reasoning stands between its tags, and dim on a terminal."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.inside = False
        # A model writes newlines between its tags: the first ones of each part are not shown.
        self.begun = False
        self.status: Status | None = None

    def loading(self, text: str) -> None:
        if self.out.is_terminal:
            self.status = self.out.status(text)
            self.status.start()

    def decision(self, decision: Decision) -> None:
        if self.status is not None:
            self.status.stop()
        mode = {Mode.AUTO: "neither"}.get(decision.taken, decision.taken.value)
        self._put(
            f"p(think) = {decision.thinking_probability:.3f}, p(direct) = {decision.direct_probability:.3f}; "
            f"{'forced' if decision.forced else 'chose'}: {mode}\n"
        )
        if decision.taken is not Mode.DIRECT:
            self.inside = True
            self._put(f"{THINK_OPEN}\n", dim=True)

    def text(self, text: str, reasoning: bool) -> None:
        if self.inside and not reasoning:
            self._leave()
        if not self.begun:
            text = text.lstrip("\n")
        self.begun = self.begun or bool(text)
        self._put(text, dim=reasoning)

    def _leave(self) -> None:
        self._put(f"\n{THINK_CLOSE}\n", dim=True)
        self.inside = self.begun = False

    def end(self, answer: Answer) -> None:
        self._put("\n")
        if not answer.finished:
            self._put(f"(cut: all {answer.tokens} tokens are used; raise --max-new-tokens)\n")

    def _put(self, text: str, dim: bool = False) -> None:
        # A model may draw any character, those that steer a terminal too.
        text = "".join(char for char in text if char in "\n\t" or char.isprintable())
        self.out.print(text, end="", style="dim" if dim else None, markup=False, highlight=False, soft_wrap=True)
        self.out.file.flush()
