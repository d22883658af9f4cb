"""`r4b generate`: what it asks, and what stands on a terminal, in a pipe and in JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from r4b_core.cli import output
from r4b_core.cli.main import app
from r4b_core.evaluate import generate as course
from r4b_core.evaluate.generate import Answer, Decision, Event, Loading, Piece, Question
from r4b_core.modes import Mode
from tests.evaluate.checkpoints import write_checkpoint, write_photograph

THOUGHT = Decision(0.75, 0.2, Mode.THINKING, forced=False)
ANSWERED = Decision(0.1, 0.9, Mode.DIRECT, forced=True)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", *arguments])


def thinking() -> Iterator[Event]:
    yield Loading(Path("run"), 2_000_000)
    yield THOUGHT
    yield from (Piece("so\n", True), Piece("[b]four[/b]", True), Piece("\n\n", False), Piece("4", False))
    yield Answer(THOUGHT, "so\n[b]four[/b]", "4", 7, finished=True)


def direct() -> Iterator[Event]:
    yield Loading(Path("run"), 2_000_000)
    yield ANSWERED
    yield from (Piece("\n\n", False), Piece("4\x1b[2J", False), Piece("4", False))
    yield Answer(ANSWERED, "", "4\x1b[2J4", 6, finished=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Question]]:
    calls: list[tuple[Path, Question]] = []

    def ask(folder: Path, question: Question) -> Iterator[Event]:
        calls.append((folder, question))
        return direct() if question.mode is Mode.DIRECT else thinking()

    monkeypatch.setattr(course, "ask", ask)
    return calls


def test_a_run_as_the_first_argument(asked: list[tuple[Path, Question]]) -> None:
    result = run("runs/demo", "--image", "board.png", "--prompt", "final value ?", "--mode", "auto")
    assert result.exit_code == 0
    assert asked == [(Path("runs/demo"), Question("final value ?", (Path("board.png"),)))]
    assert result.output == (
        "p(think) = 0.750, p(direct) = 0.200; chose: thinking\n<think>\nso\n[b]four[/b]\n</think>\n4\n"
    )


def test_every_option(asked: list[tuple[Path, Question]]) -> None:
    options = "--max-new-tokens 6 --temperature 0.5 --top-p 0.9 --seed 3 --mode direct".split()
    images = ["--image", "a.png", "--image", "b.png"]
    result = run("--model", "folder", "--prompt", "which?", "--system", "Be brief.", *images, *options)
    paths = (Path("a.png"), Path("b.png"))
    assert asked == [(Path("folder"), Question("which?", paths, "Be brief.", Mode.DIRECT, 6, 0.5, 0.9, 3))]
    # What would clear the terminal is left out.
    assert result.output == (
        "p(think) = 0.100, p(direct) = 0.900; forced: direct\n4[2J4\n"
        "(cut: all 6 tokens are used; raise --max-new-tokens)\n"
    )


@pytest.mark.parametrize("arguments", [[], ["run", "--model", "folder"]])
def test_one_model_is_given(arguments: list[str]) -> None:
    result = run(*arguments, "--prompt", "what?")
    assert result.exit_code == 2 and "give the model's folder once" in result.stderr


def test_a_prompt_is_given() -> None:
    assert run("run").exit_code == 2 and "--prompt" in run("run").stderr


def test_reasoning_is_dim_on_a_terminal(asked: list[tuple[Path, Question]], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system="standard", highlight=False, width=20)
    monkeypatch.setattr(output, "console", lambda: terminal)
    run("run", "--prompt", "what?")
    text = shown.getvalue()
    assert "\x1b[2mso" in text and "\x1b[2m[b]four[/b]\x1b[0m" in text
    assert "\x1b[2m4" not in text and text.rstrip().endswith("4")


def test_json_is_one_object(asked: list[tuple[Path, Question]]) -> None:
    result = run("run", "--prompt", "what?", "--json")
    assert json.loads(result.output) == {
        "thinking_probability": 0.75,
        "direct_probability": 0.2,
        "taken": "thinking",
        "forced": False,
        "reasoning": "so\n[b]four[/b]",
        "answer": "4",
        "tokens": 7,
        "finished": True,
    }


def test_from_a_checkpoint_to_the_screen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_vl")
    image = str(write_photograph(tmp_path))
    asked = ("--model", str(tmp_path), "--image", image, "--prompt", "What is it?", "--max-new-tokens", "6")
    shown = run(*asked, "--mode", "direct")
    assert shown.exit_code == 0, shown.output
    head, *_, last = shown.output.splitlines()
    assert head.startswith("p(think) = 0.") and head.endswith("forced: direct") and last.startswith("(cut: all 6 ")
    answer = json.loads(run(*asked, "--mode", "direct", "--json").output)
    assert answer["taken"] == "direct" and answer["tokens"] == 6 and not answer["reasoning"]
    assert f"p(think) = {answer['thinking_probability']:.3f}, " in head
    refused = run("--model", str(tmp_path), "--image", "nowhere.png", "--prompt", "What is it?")
    assert refused.exit_code == 2 and refused.stdout == "" and "nowhere.png: cannot be read" in refused.stderr
