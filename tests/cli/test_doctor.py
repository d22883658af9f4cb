"""doctor: it runs anywhere, fails where something is missing, and knows every variable that the code reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r4b_core.cli.checks import GPU, Machine, Verdict, examine
from r4b_core.cli.doctor import ENVIRONMENT, _driver, conv3d_ratio, notes
from r4b_core.cli.main import app
from r4b_core.config.load import load_recipe
from r4b_core.data.records import Record, write_records
from tests.evaluate.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_names_every_op_with_its_backend() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    ops = {path.parent.name for path in (ROOT / "kernels" / "r4b_kernels").glob("*/reference.py")}
    chosen = set(re.findall(r"^\s*(\w+)\s+\w+\s+chosen", result.output, re.MULTILINE))
    assert ops <= chosen
    assert "gloo: available" in result.output


def test_a_missing_requirement_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = metadata.version

    def without_psutil(name: str) -> str:
        if name == "psutil":
            raise metadata.PackageNotFoundError(name)
        return "9.0" if name == "torch" else genuine(name)

    monkeypatch.setattr(metadata, "version", without_psutil)
    result = doctor()
    assert result.exit_code == 1
    assert "psutil not installed" in result.output
    assert re.search(r"torch 9\.0, needs <2\.14,>=2\.11", result.output)
    assert "missing: torch, psutil" in result.output


def test_a_laptop_can_run_the_demo() -> None:
    result = doctor("demo")
    assert result.exit_code == 0, result.output
    assert "layout: tp 1 x pp 1 x cp 1 x dp 1 on 1 rank(s)" in result.output and "can run here" in result.output


def test_says_every_reason_why_a_recipe_cannot_run() -> None:
    result = doctor("qwen3-vl-8b-gspo", "--ranks", "64")
    assert result.exit_code == 1
    reasons = re.findall("cannot run: (.{30})", result.output)
    assert len(reasons) >= 5, result.output
    for reason in ("memory: needs ", "model.processor: checkpoints/", "model.init_from = runs/", "data.train: 'data/"):
        assert any(found.startswith(reason) for found in reasons), reason
    last = result.output.splitlines()[-1]
    assert last == f"{len(reasons)} reason(s) above why qwen3-vl-8b-gspo cannot run here"


def test_a_layout_that_does_not_fit_is_a_reason() -> None:
    result = doctor("smoke", "parallel.tp=2", "--ranks", "3")
    assert result.exit_code == 1 and "needs a multiple of 2 ranks, there are 3" in result.output
    assert "tp 2 x pp 1 x cp 1 x dp 1 on 2 rank(s)" in doctor("smoke", "parallel.tp=2", "--ranks", "2").output
    assert doctor("smoke", "parallel.tpp=2").exit_code == 2, "a recipe that is none is the caller's mistake"


def test_json_is_one_object() -> None:
    result = doctor("smoke", "telemetry.loggers=[wandb]", "--json")
    report = json.loads(result.output)
    assert result.exit_code == (0 if report["recipe"]["can_run"] else 1)
    assert not report["missing"] and report["required"]["torch"]["problem"] is None
    assert report["machine"]["memory_free"] > 0 and report["communication"]["gloo"] is True
    assert {row["op"] for row in report["kernels"]["backends"]} >= {"rms_norm", "prefix_attention"}
    assert bool(report["optional"]["wandb"]) == report["recipe"]["can_run"]


H100 = GPU("H100", 80 * 10**9, 79 * 10**9, (9, 0))


def machine_with(*gpus: GPU, disk: float = 1e13, packages: bool = True, free: float = 1e12) -> Machine:
    return Machine(gpus, 2 * 10**12, int(free), lambda folder: int(disk), lambda name: packages)


def verdict(machine: Machine, *overrides: str, ranks: int = 1, name: str = "smoke") -> Verdict:
    return examine(load_recipe(name, list(overrides)).recipe, ranks, machine)


@pytest.mark.parametrize(
    ("machine", "overrides", "reason"),
    [
        (machine_with(H100), [], ""),
        (machine_with(replace(H100, capability=(7, 5))), [], ""),
        (machine_with(H100, replace(H100, capability=(7, 5))), ["model.dtype=bfloat16"], r"GPU 1 .*capability 7\.5"),
        (machine_with(H100, replace(H100, free=10**9)), [], r"per GPU in .*GPU 1 has 1\.0 of its 80\.0 GB free: end"),
        (
            machine_with(H100),
            ["model.size=4b"],
            r"needs \d+\.\d GB per GPU in .*GPU 0 has 80\.0 GB; r4b plan",
        ),
        (machine_with(free=1e6), [], r"needs 0\.\d GB in .*the host has 0\.0 of its 2000\.0 GB free"),
        (
            machine_with(H100, packages=False),
            ["telemetry.loggers=[wandb]"],
            "wandb is not installed; pip",
        ),
        (machine_with(H100, packages=False), ["data.decoder=dali"], "nvidia-dali-cuda120 is not installed; pip"),
        (machine_with(H100, disk=1e6), [], r"checkpoint.keep = \d+: .* has 0\.0 free"),
        (machine_with(H100), ["model.init_from=nowhere"], "model.init_from = nowhere: nowhere: neither a run folder"),
    ],
)
def test_what_a_recipe_needs(machine: Machine, overrides: list[str], reason: str) -> None:
    problems = verdict(machine, *overrides).problems
    assert bool(problems) == bool(reason), problems
    assert not reason or any(re.search(reason, problem) for problem in problems), problems


def test_the_files_of_a_recipe(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_vl")
    records = [Record(id=str(n), source="test", question="What is it?", answer="4", response="4") for n in range(3)]
    write_records(tmp_path / "train.parquet", records)
    files = [f"data.train=[{tmp_path}/*.parquet]", f"data.held_out_files=[{tmp_path}/nowhere.parquet]"]
    shape = ["model.shape.patch_size=16", "model.shape.vocab_size=320", f"model.processor={tmp_path}"]
    found = verdict(machine_with(H100), *files, *shape, "data.max_pixels=4096", name="qwen3-vl-2b-sft")
    assert found.facts["images"].startswith("scaled to 1,024 .. 4,096 pixels, at most 4 tokens each")
    assert found.facts["data.train"] == "3 records in 1 file(s)"
    problems = [problem for problem in found.problems if "data." in problem or "processor" in problem]
    assert problems == [f"data.held_out_files: '{tmp_path}/nowhere.parquet' matches no file (from {Path.cwd()})"]


def test_notes_on_what_costs_time() -> None:
    two = machine_with(H100, H100)
    fine = {
        "driver": "560.35",
        "cuda": "12.8",
        "conv3d_ratio": 1.1,
        "shared_memory": 2**33,
        "open_files": None,
        "pixels": {"pillow": 89_478_485, "image": 40_000_000},
    }
    table = [{"op": "rms_norm", "backend": "triton", "reason": "chosen"}]

    def said(here: Machine = two, chosen: str = "triton", **changes: Any) -> str:
        rows = [{"op": "rms_norm", "backend": chosen, "reason": "chosen"}, *table[1:]]
        return "\n".join(notes({"machine": {**fine, **changes}, "kernels": {"backends": rows}}, here))

    assert said() == ""
    assert "r4b uses the linear" in said(conv3d_ratio=12.0) and "takes 12 times" in said(conv3d_ratio=12.0)
    assert "/dev/shm has 67 MB" in said(shared_memory=2**26)
    assert said(machine_with(H100), shared_memory=2**26) == "", "one GPU talks to nobody"
    assert "may open 256 files" in said(open_files=256)
    assert "Image.MAX_IMAGE_PIXELS" in said(pixels={"pillow": 1000, "image": 40_000_000})
    assert "rms_norm: only the reference serves" in said(chosen="reference")
    assert "built without CUDA" in said(machine_with(), cuda=None) and "torch sees no GPU" in said(machine_with())


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build\nGCC version: 12.2\n",
    ],
)
def test_the_drivers_version(text: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert _driver(tmp_path / "version") == "535.129.03"
    assert _driver(tmp_path / "nowhere") is None


def test_a_patch_embedding_is_timed() -> None:
    assert 0.1 < conv3d_ratio(patches=16) < 1000


def test_lists_every_environment_variable_that_is_read() -> None:
    """A variable that the code reads and doctor does not list would be a hidden one."""
    reads = re.compile(r"""(?:environ(?:\.\w+\(|\[)|getenv\()\s*["']([A-Z_0-9]+)["']""")
    found = {
        name
        for package in ("kernels/r4b_kernels", "r4b_core")
        for path in (ROOT / package).rglob("*.py")
        for name in reads.findall(path.read_text(encoding="utf-8"))
    }
    assert {"RANK", "WORLD_SIZE"} <= found
    assert found <= set(ENVIRONMENT)
