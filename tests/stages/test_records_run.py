"""Whole runs on files of records, both families: they learn, and kill -9 changes no number of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from r4b_core.data.records import write_records
from r4b_core.parallel import checkpoint
from r4b_core.telemetry.metrics import read_metrics
from tests.stages.fork_server import Ended, ForkServer
from tests.stages.record_files import SHAPES, make_records, write_data, write_processor
from tests.stages.runs import lines, outcome, rollouts

FAMILIES = ("qwen3_vl", "r4b")


def recipe_of(folder: Path, family: str) -> dict[str, Any]:
    return {
        "name": "records",
        "model": {"family": family, "processor": str(folder / family), "shape": SHAPES[family]},
        "data": {
            "task": "records",
            "train": [f"{folder}/train-*.parquet"],
            "held_out_files": [str(folder / "held-out.parquet")],
            "lookahead": 4,
        },
        "packing": {"capacity": 256},
        "pretrain": {"steps": 2, "batch_size": 2, "optim": {"lr": 0.004, "lr_scale": {"decoder": 0}}},
        "anneal": {"steps": 5, "batch_size": 2, "optim": {"lr": 0.004}},
        "distill": {"steps": 4, "batch_size": 2, "optim": {"lr": 0.004}},
        "bpo": {
            "steps": 3,
            "prompts": 3,
            "group_size": 2,
            "max_new_tokens": 10,
            "probe_every": 2,
            "probe_prompts": 2,
            "bands": {"[0,0.5)": 1, "[0.5,1]": 2},
        },
        "evaluate": {"items": 4},
        "checkpoint": {"every": 2, "keep": 1},
        "telemetry": {"rollouts_every": 1},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Processors of both families, and data with three records that cannot be used."""
    made = tmp_path_factory.mktemp("records")
    write_data(made)
    records = make_records(24)
    records[3].images, records[8].response, records[13].answer = [b"no image"], "<think>", None
    write_records(made / "train-0.parquet", records, row_group=8)
    for family in FAMILIES:
        write_processor(made / family, family)
        (made / f"{family}.yaml").write_text(yaml.safe_dump(recipe_of(made, family)))
    return made


Train = Callable[..., Ended]


@pytest.fixture(scope="module")
def train(server: ForkServer, folder: Path) -> Train:
    def start(family: str, run: Path, *overrides: str, **more: Any) -> Ended:
        return server.run("train", folder / f"{family}.yaml", *overrides, "--run", run, **more)

    return start


@pytest.fixture(scope="module")
def straight_of(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family) / "run"
        ended = train(family, made[family])
        assert ended.status == 0, ended.output
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_trains_on_records(straight_of: dict[str, Path], family: str) -> None:
    run = straight_of[family]
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["stage"] for line in steps] == ["pretrain"] * 2 + ["anneal"] * 5 + ["distill"] * 4 + ["bpo"] * 3
    assert all(abs(line["loss"]) < 20 and 0 <= line["grad_norm"] < 1e3 and "skipped" not in line for line in steps)
    assert steps[10]["loss"] < 0.7 * steps[0]["loss"]
    for line in steps[:11]:
        assert 0.7 < line["data/fill"] <= 1 and line["data/tokens"] <= 512 and line["perf/data_wait_s"] >= 0
        assert 0 < line["data/thinking_share"] < 1 and line["data/records"] >= 4
    epochs = [line["data/epoch"] for line in steps[2:7]]
    assert epochs == sorted(epochs) and epochs[0] > 0
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before_bpo", "after_bpo"):
        assert list(summary[when]) == ["overall", "numbers_en", "words"]
        assert summary[when]["overall"]["thinking"]["thinking_rate"] == 1
    assert set(summary["seconds"]) == {"pretrain", "anneal", "distill", "evaluate", "bpo"}
    evaluated = [(line["stage"], line["step"]) for line in lines(run) if "eval/words/auto/truncation" in line]
    assert evaluated == [("distill", 4), ("bpo", 3)]
    assert any("thinking_rate/free/words" in line for line in steps)
    page = (run / "report.html").read_text()
    assert "distill: loss" in page and "overall" in page and "numbers_en" in page


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_used_is_named(straight_of: dict[str, Path], family: str) -> None:
    found = [json.loads(line) for line in (straight_of[family] / "quarantine.jsonl").read_text().splitlines()]
    reasons = {(line["id"], line["reason"]) for line in found}
    certain = {("numbers/en/3", "image cannot be used"), ("words/8", "response cannot be used")}
    assert certain <= reasons <= certain | {("numbers/en/13", "question cannot be used")} and len(reasons) == len(found)


PLACES: dict[str, list[dict[str, Any]]] = {
    "an annealing step": [{"at": "r4b_core.stages.supervised:Feed.next", "nth": 6}],
    "between a step and its checkpoint": [{"at": "r4b_core.stages.job:Stage.save"}],
    "a distillation step": [
        {"at": "r4b_core.stages.run:distill"},
        {"at": "r4b_core.stages.supervised:Feed.next", "nth": 4},
    ],
    "a BPO update after a checkpoint": [{"at": "r4b_core.stages.bpo:pack", "nth": 3}],
}


def test_a_run_killed_everywhere_equals_the_undisturbed_one(
    train: Train, straight_of: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name, events in PLACES.items():
        ended = train("qwen3_vl", run, events=events)
        assert ended.status == -9, f"{name}: {ended.output}"
    ended = train("qwen3_vl", run)
    assert ended.status == 0, ended.output
    mine, undisturbed = outcome(run), outcome(straight_of["qwen3_vl"])
    for what, expected in undisturbed.items():
        assert mine[what] == expected, what
    quarantined = [
        sorted((path / "quarantine.jsonl").read_text().splitlines()) for path in (run, straight_of["qwen3_vl"])
    ]
    assert quarantined[0] == quarantined[1]


def test_other_data_or_another_batch_size_cannot_go_on(
    train: Train, straight_of: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = train("qwen3_vl", run, events=[{"at": "r4b_core.stages.supervised:Feed.next", "nth": 6}])
    assert ended.status == -9, ended.output
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = train("qwen3_vl", run, f"data.train=[{folder}/train-0.parquet]")
    assert ended.status == 2 and "was trained on another data set" in ended.output, ended.output
    ended = train("qwen3_vl", run, "anneal.batch_size=3")
    assert ended.status == 2 and "anneal.batch_size: " in ended.output, ended.output
    assert "holds the position of 2 packed sequences and the recipe asks for 3" in " ".join(ended.output.split())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_teacher_on_the_fly(train: Train, straight_of: dict[str, Path], tmp_path: Path) -> None:
    teacher = straight_of["qwen3_vl"]
    stages = ("pretrain.steps=0", "anneal.steps=0", "bpo.steps=0", "distill.steps=3")
    settings = ("distill.logit_weight=1", f"distill.teacher={teacher}", "distill.teacher_top_k=6")
    ended = train("qwen3_vl", tmp_path / "run", *stages, *settings, "distill.temperature=1.5")
    assert ended.status == 0, ended.output
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    divergences = [line["distill/divergence"] for line in steps]
    assert divergences[2] < 0.5 * divergences[0]
    assert all(line["distill/taught"] == 1 and 0.05 < line["distill/teacher_mass"] <= 1.001 for line in steps)
    # Where the student is the teacher there is nothing to learn.
    ended = train("qwen3_vl", tmp_path / "same", *stages, *settings, "distill.steps=1", f"model.init_from={teacher}")
    assert ended.status == 0, ended.output
    (line,) = [line for line in lines(tmp_path / "same") if "loss" in line]
    assert abs(line["distill/divergence"]) < 1e-6 and line["grad_norm"] < 1e-3
    ended = train("r4b", tmp_path / "other", *stages, *settings)
    assert ended.status == 2 and "give a teacher of the same family" in " ".join(ended.output.split())
    assert not (tmp_path / "other").exists()


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no such files": (["data.train=[absent/*.parquet]"], "data.train: 'absent/*.parquet' matches no file"),
    "no files": (["data.train=[]"], "data.train is empty and pretrain, anneal, distill, bpo train on records"),
    "no processor": (["model.processor=null"], "model.processor is not set, and records need a tokenizer"),
    "no held-out files": (["data.held_out_files=[]"], "data.held_out_files is empty and bpo.probe_every asks for"),
    "a board's tail": (["anneal.tail=direct"], "anneal.annotator and anneal.tail are of boards"),
    "boards of qwen3_vl": (["data.task=boards"], "model.family = qwen3_vl does not go with data.task = boards"),
    "no teacher's columns": (["distill.logit_weight=0.5"], "lacks the columns teacher_ids, teacher_logprobs"),
    "a mute teacher": (["distill.teacher=x"], "distill.teacher has no say where distill.logit_weight = 0"),
    "an absent teacher": (["distill.teacher=x", "distill.logit_weight=1"], "distill.teacher: x: neither a run folder"),
    "an empty band": (['bpo.bands={"[0.8,0.9]": 1}'], "bpo.bands: data.train has no prompt in [0.8,0.9]"),
    "no band": (["bpo.bands={easy: 1}"], "'easy' is no band: write an interval of pass rates such as '[0,0.25)'"),
    "no room": (["bpo.max_new_tokens=256"], "packing.capacity = 256 leaves no room for a prompt beside"),
    "held-out files that are trained on": (
        ["data.train=[{folder}/*.parquet]"],
        "held-out.parquet is in data.train too",
    ),
    "too large a batch": (["distill.batch_size=100"], "data.train holds 48 records, fewer than the 100 packed"),
    "too many prompts": (["bpo.prompts=100"], "bpo.prompts = 100 and data.train holds 48"),
    "too small a table": (["model.shape.vocab_size=64"], "set model.shape.vocab_size, or give the model's own"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_before_anything_is_launched(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r4b_core.config.load import load_recipe
    from r4b_core.stages.run import run_recipe

    overrides, words = REFUSALS[case]
    monkeypatch.setattr("r4b_core.parallel.runtime.start", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ValueError) as refused:
        settings = [override.replace("{folder}", str(folder)) for override in overrides]
        run_recipe(load_recipe(folder / "qwen3_vl.yaml", settings), tmp_path / "run")
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_files_that_are_mostly_unusable_end_the_run(train: Train, folder: Path, tmp_path: Path) -> None:
    records = make_records(40)
    for record in records[::3]:
        record.images = [b"no image"]
    write_records(tmp_path / "bad.parquet", records, row_group=8)
    ended = train("qwen3_vl", tmp_path / "run", f"data.train=[{tmp_path}/bad.parquet]")
    said = " ".join(ended.output.split())
    assert ended.status == 2 and "Traceback" not in said, said
    assert "records cannot be used (most often: image cannot be used" in said
    assert "more than data.max_bad_share = 0.2 of 40; quarantine.jsonl names them all" in said
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) > 8


def test_the_checkpoint_knows_the_pass_rates_that_the_rollouts_showed(straight_of: dict[str, Path]) -> None:
    path = checkpoint.latest(straight_of["qwen3_vl"] / "checkpoints" / "bpo")
    assert path is not None
    held = {int(place): state[0] for place, state in checkpoint.read_state(path)["source"]["prompts"].items()}
    rates = {record.key: record.right / 4 for record in make_records(48) if record.right is not None}
    places = {record.key: place for place, record in enumerate(make_records(48))}
    drawn = set()
    for _, rows in sorted(rollouts(straight_of["qwen3_vl"]).items()):
        for name in {row["sample_id"] for row in rows}:
            right = [row["reward"] > 0 for row in rows if row["sample_id"] == name]
            rates[name] += 0.5 * (sum(right) / len(right) - rates[name])
            drawn.add(name)
    assert len(drawn) >= 3
    assert {name: held[places[name]] for name in drawn} == {name: rates[name] for name in drawn}


def test_without_held_out_files_nothing_is_evaluated(train: Train, tmp_path: Path) -> None:
    stages = ("pretrain.steps=0", "anneal.steps=1", "distill.steps=0", "bpo.steps=0", "data.held_out_files=[]")
    ended = train("qwen3_vl", tmp_path / "run", *stages)
    assert ended.status == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before_bpo"] == summary["after_bpo"] == {}
    assert (tmp_path / "run" / "report.html").is_file()
    shutil.rmtree(tmp_path / "run")
