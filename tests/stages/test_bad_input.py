"""What cannot work is one clear error, before anything in the run folder is touched; the rest goes on, logged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from r4b_core.telemetry.files import only_writer
from tests.stages.fork_server import ROOT, Ended, ForkServer
from tests.stages.runs import SMALL, figures, lines, rollouts

REFUSED = 2


@pytest.fixture
def run(halfway: Path, tmp_path: Path) -> Path:
    """A run to go on with; its newest checkpoint is of BPO's third step."""
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def one_error(ended: Ended) -> str:
    """The error of a refused run, which is its only output."""
    assert ended.status == REFUSED, ended.output
    assert "Traceback" not in ended.output
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.output
    return errors[0]


REFUSALS: dict[str, tuple[list[Any], str]] = {
    "another seed": (["seed=1"], "^error: seed: .*was trained with seed 0 and the recipe says 1: resume with the same"),
    "other data": (["data.held_out=0.5"], "^error: data: .*fingerprint .*restore the data and its settings, or start"),
    "another recipe": (
        ["name=other"],
        "holds a run of the recipe smoke, and this one is other: give this run",
    ),
    "another model": (
        ["model.shape={num_layers: 3}"],
        r"^error: model\.shape: .* resume with the same model, or",
    ),
    "fewer steps": (["bpo.steps=2"], r"^error: bpo\.steps: the recipe asks for 2 .* ask for 3 or more, or start"),
    "no resuming": (["--resume", "never"], "holds a run .*; give a new folder or --resume auto"),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_a_run_that_cannot_go_on_is_refused_untouched(server: ForkServer, run: Path, change: str) -> None:
    extra, words = REFUSALS[change]
    before = bytes_of(run)
    error = one_error(server.run("train", *SMALL, *extra, "--run", run))
    assert re.search(words, error), error
    assert bytes_of(run) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage,words", [(cut, "bytes instead of"), (Path.unlink, "is missing")])
def test_a_damaged_checkpoint_is_named_with_the_way_out(
    server: ForkServer, run: Path, damage: Callable[[Path], None], words: str
) -> None:
    newest = run / "checkpoints" / "bpo" / "step_00000003"
    damage(newest / "__0_0.distcp")
    error = one_error(server.run("train", *SMALL, "--run", run))
    assert "__0_0.distcp" in error and words in error and "remove it" in error
    shutil.rmtree(newest)
    ended = server.run("train", *SMALL, "--run", run, events=[{"at": "r4b_core.stages.run:bpo"}])
    assert ended.status == -9, ended.output


def test_a_reference_that_is_gone_is_an_error(server: ForkServer, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "reference")
    error = one_error(server.run("train", *SMALL, "--run", run))
    assert "the reference policy of this run is gone" in error
    assert "restore the folder, set bpo.kl_coef=0, or start a new run folder" in error
    ended = server.run("train", *SMALL, "bpo.kl_coef=0", "--run", run)
    assert ended.status == 0, ended.output


def test_a_run_past_its_first_evaluation_cannot_do_without_it(server: ForkServer, run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    error = one_error(server.run("train", *SMALL, "--run", run))
    assert "the evaluation at anneal step 15 is missing" in error


def test_more_steps_go_on_from_a_finished_run(server: ForkServer, straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    ended = server.run("train", *SMALL, "bpo.steps=5", "--run", run)
    assert ended.status == 0, ended.output
    evaluated = [(line["stage"], line["step"]) for line in lines(run) if "eval/easy/auto/accuracy" in line]
    assert evaluated == [("anneal", 15), ("bpo", 4), ("bpo", 5)]
    last = next(line for line in reversed(lines(run)) if "eval/easy/auto/accuracy" in line)
    assert figures(run)["after_bpo"]["easy"]["auto"]["mean_tokens"] == last["eval/easy/auto/mean_tokens"]


def test_a_new_run_in_the_folder_of_another_recipe_is_refused(server: ForkServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = server.run("train", *SMALL, "--run", run, events=[{"at": "r4b_core.stages.run:pretrain"}])
    assert started.status == -9, started.output
    assert "holds a run of another recipe" in one_error(server.run("train", *SMALL, "seed=3", "--run", run))


def test_two_runs_in_one_folder(server: ForkServer, run: Path) -> None:
    before = bytes_of(run)
    with only_writer(run):
        assert "another run is at work here: wait" in one_error(server.run("train", *SMALL, "--run", run))
    assert bytes_of(run) == before


@pytest.mark.parametrize("command", [["generate", "--image", "x.png", "--prompt", "final value ?"], ["eval"]])
@pytest.mark.parametrize("folder", ["empty", "absent", "begun"])
def test_a_model_that_is_not_there(server: ForkServer, tmp_path: Path, command: list[str], folder: str) -> None:
    run = tmp_path / "run"
    words = "there is no such folder"
    if folder != "absent":
        run.mkdir()
        words = "neither a run folder nor a checkpoint in one"
    if folder == "begun":
        shutil.copy(ROOT / "recipes" / "smoke.yaml", run / "recipe.resolved.yaml")
        words = f"no complete checkpoint yet; train it with: r4b train {run}/recipe.resolved.yaml --run {run}"
    Image.new("RGB", (64, 16)).save(tmp_path / "x.png")
    name, *options = command
    assert words in one_error(server.run(name, run, *options, cwd=tmp_path))


def test_a_full_disk_is_survived_and_logged(server: ForkServer, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = [{"at": "r4b_core.parallel.manifest:publish", "match": "anneal", "do": "tests.stages.accidents:full_disk"}]
    ended = server.run("train", *SMALL, "--run", run, events=events)
    assert ended.status == 0, ended.output
    assert "ALARM anneal step 3: no checkpoint was written" in ended.output
    alarms = [line for line in lines(run) if "alarm/checkpoint" in line]
    assert [(line["stage"], line["step"]) for line in alarms] == [("anneal", 3)]
    assert "No space left on device" in alarms[0]["alarm/checkpoint"]
    assert [line for line in lines(run) if line not in alarms] == lines(straight)
    assert rollouts(run) == rollouts(straight) and figures(run) == figures(straight)
    assert sorted(path.name for path in (run / "checkpoints" / "anneal").iterdir()) == ["step_00000015"]


def test_bpo_does_not_begin_without_its_reference_on_disk(server: ForkServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = [
        {"at": "r4b_core.parallel.manifest:publish", "match": "reference", "do": "tests.stages.accidents:full_disk"}
    ]
    error = one_error(server.run("train", *SMALL, "--run", run, events=events))
    assert "the reference policy must be on disk before BPO begins" in error and "No space left" in error
    assert server.run("train", *SMALL, "--run", run).status == 0


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(server: ForkServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    events = [{"at": "r4b_core.stages.anneal:annealing_samples", "do": "tests.stages.accidents:poison_annealing"}]
    error = one_error(server.run("train", *SMALL, "--run", run, events=events))
    assert "10 updates in a row were skipped" in error and "optim.lr" in error
    skipped = [line["step"] for line in lines(run) if "skipped" in line]
    assert skipped == list(range(1, 10))
