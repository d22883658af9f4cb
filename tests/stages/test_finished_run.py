"""What is done with a run that has ended: eval, generate and report, as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from r4b_core.data.boards import make_samples
from tests.stages.fork_server import ForkServer
from tests.stages.runs import figures, files

ROW = re.compile(r"[│┃|]\s*(easy|mid|hard)\s*[│┃|]\s*(direct|thinking|auto)\s*[│┃|]\s*([\d.]+)\s*[│┃|]\s*([\d.]+)\s")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A picture that no run was trained on, and a question about it."""
    (sample,) = make_samples("held_out", 0, "test", 0, 1, {"read": 1.0})
    path = tmp_path_factory.mktemp("boards") / "board.png"
    Image.fromarray(sample.images[0]).save(path)
    return path, sample.question


def test_the_summary_has_the_keys_that_are_promised(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    assert list(summary) == ["before_bpo", "after_bpo", "seconds", "peak_rss_gb"]
    for when in ("before_bpo", "after_bpo"):
        assert list(summary[when]) == ["easy", "hard"]
        for modes in summary[when].values():
            assert set(modes) == {"direct", "thinking", "auto"}
            for cell in modes.values():
                assert set(cell) == {"accuracy", "mean_tokens", "thinking_rate"}
            assert modes["direct"]["thinking_rate"] == 0 and modes["thinking"]["thinking_rate"] == 1
    assert set(summary["seconds"]) == {"pretrain", "anneal", "evaluate", "bpo"}
    assert 0.1 < summary["peak_rss_gb"] < 10


@pytest.mark.parametrize("what,when", [("", "after_bpo"), ("checkpoints/anneal/step_00000015", "before_bpo")])
def test_eval_finds_what_the_run_found(server: ForkServer, straight: Path, what: str, when: str) -> None:
    before = files(straight)
    ended = server.run("eval", straight / what)
    assert ended.status == 0, ended.output
    shown = {(family, mode): (accuracy, tokens) for family, mode, accuracy, tokens in ROW.findall(ended.output)}
    assert len(shown) == 9
    for family, modes in figures(straight)[when].items():
        for mode, cell in modes.items():
            assert shown[family, mode] == (f"{cell['accuracy']:.3f}", f"{cell['mean_tokens']:.1f}")
    assert ended.output.count("auto, wrong images") == 3
    assert files(straight) == before


def test_eval_on_other_numbers_of_items(server: ForkServer, straight: Path) -> None:
    ended = server.run("eval", straight, "--items", 3)
    assert ended.status == 0 and "3 items per family" in re.sub(r"\s+", " ", ended.output), ended.output
    assert server.run("eval", straight, "--items", 1).status == 2  # one question has no other one's image


@pytest.mark.parametrize("mode", ["thinking", "direct", "auto"])
def test_generate_answers_about_an_image(
    server: ForkServer, straight: Path, board: tuple[Path, str], mode: str
) -> None:
    arguments = ("generate", straight, "--image", board[0], "--prompt", board[1], "--mode", mode)
    ended = server.run(*arguments)
    assert ended.status == 0, ended.output
    head = r"p\(think\) = 0\.\d{3}, p\(direct\) = 0\.\d{3}; (forced|chose): (thinking|direct|neither)\n"
    taken = re.search(head, ended.output)
    assert taken and taken[1] == ("chose" if mode == "auto" else "forced"), ended.output
    if mode != "auto":
        assert taken[2] == mode and ("<think>\n" in ended.output) is (mode == "thinking")
    assert server.run(*arguments).output == ended.output


@pytest.mark.parametrize(
    "options,words",
    [
        (("--prompt", "why ?"), "the word 'why' is not among"),
        (("--prompt", "final value ?", "--image", "absent.png"), "absent.png"),
        (("--prompt", "final value ?", "--image", __file__), "test_finished_run.py"),
    ],
)
def test_generate_refuses_what_it_cannot_read(
    server: ForkServer, straight: Path, board: tuple[Path, str], options: tuple[str, ...], words: str
) -> None:
    ended = server.run("generate", straight, "--image", board[0], *options)
    assert ended.status == 2 and words in ended.output and "Traceback" not in ended.output, ended.output


def test_report_can_be_written_again(server: ForkServer, straight: Path) -> None:
    written = straight / "report.html"
    text = written.read_text()
    written.unlink()
    ended = server.run("report", straight)
    assert ended.status == 0 and str(written) in ended.output, ended.output
    assert len(written.read_text()) == pytest.approx(len(text), rel=0.02)
