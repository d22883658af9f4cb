"""The trainer on a GPU: updates, rollouts and checkpoints of both families against the CPU's, whole runs, two ranks.

    pytest -m gpu tests/gpu/test_training.py                         on a machine with a GPU
    TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_training.py      a rehearsal on the CPU

float32 must agree with the CPU to 1e-3; bfloat16 may be 1.5 times as far from the CPU's float32 as the CPU's own
bfloat16 is. What two ranks compute must be what one does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from r4b_core.config.load import load_recipe
from r4b_core.stages.run import run_recipe
from r4b_core.telemetry.metrics import read_metrics
from tests.gpu.updates import FAMILIES, LAYOUTS
from tests.parallel.launch import environment

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()


def updates(out: Path, layout: str | None = None, **extra: str) -> dict[str, Any]:
    ranks = [] if layout is None else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *ranks, "-m", "tests.gpu.updates", str(out), *([layout] if layout else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment(**extra), timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return updates(tmp_path_factory.mktemp("ours") / "found.json")


@pytest.fixture(scope="module")
def cpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = updates(tmp_path_factory.mktemp("cpu") / "found.json", CUDA_VISIBLE_DEVICES="")
    assert {result["device"] for result in found.values()} == {"cpu"}
    return found


def distance(found: dict[str, Any], truth: dict[str, Any], name: str) -> float:
    """Root mean square of the relative differences."""
    pairs = list(zip(found[name], truth[name], strict=True))
    return math.sqrt(sum(((a - b) / b) ** 2 for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_updates(ours: dict[str, Any], cpus: dict[str, Any], family: str) -> None:
    truth = cpus[f"{family} float32"]
    assert truth["loss"][3] < truth["loss"][0]
    for name in ("loss", "grad_norm"):
        assert distance(ours[f"{family} float32"], truth, name) < 1e-3
        allowed = 1.5 * distance(cpus[f"{family} bfloat16"], truth, name) + 2e-3
        assert distance(ours[f"{family} bfloat16"], truth, name) <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts(ours: dict[str, Any], cpus: dict[str, Any], family: str) -> None:
    mine, truth = ours[f"{family} float32"], cpus[f"{family} float32"]
    assert mine["tokens"] == truth["tokens"]
    for a, b in zip(mine["logprobs"], truth["logprobs"], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_goes_on_as_if_nothing_had_been(ours: dict[str, Any], family: str, dtype: str) -> None:
    found = ours[f"{family} {dtype}"]
    # Sums by atomic additions on a GPU come in any order.
    assert found["resumed"] == pytest.approx(found["loss"][3], rel=1e-6 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none for the rehearsal")
def test_two_ranks(cpus: dict[str, Any], tmp_path: Path, layout: str) -> None:
    found = updates(tmp_path / "found.json", layout)
    for family in FAMILIES:
        for name in ("loss", "grad_norm"):
            assert distance(found[f"{family} float32"], cpus[f"{family} float32"], name) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_records(tmp_path: Path, family: str) -> None:
    """Every stage in bfloat16, and a way back in."""
    from tests.stages.test_second_device import SFT, records

    file = records(tmp_path, family)
    run_recipe(load_recipe(file, SFT), tmp_path / "run")
    more = ["pretrain.steps=1", "anneal.steps=2", "distill.steps=2", "bpo.steps=2", "bpo.bands={}", "bpo.prompts=1"]
    run_recipe(load_recipe(file, [*SFT, *more, "bpo.kl_coef=0.01"]), tmp_path / "run")
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["stage"] for line in steps] == ["pretrain", "anneal", "anneal", "distill", "distill", "bpo", "bpo"]
    assert all(math.isfinite(line["loss"]) and "skipped" not in line for line in steps)
    assert os.path.exists(tmp_path / "run" / "report.html")
