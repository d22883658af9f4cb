"""Whole runs on a second device: nothing of the host meets anything of the device, on the way from files to metrics.

There is no GPU here; `tests.models.second_device` plays one, which computes as the CPU does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from r4b_core.config.load import load_recipe
from r4b_core.stages import demo  # noqa: F401  every module that a stage uses is to be imported before it is patched
from r4b_core.stages.run import run_recipe
from r4b_core.telemetry.metrics import read_metrics
from tests.models.second_device import SECOND, MixedDevices, OnSecond, second_device
from tests.stages.record_files import write_data, write_processor
from tests.stages.runs import SMALL
from tests.stages.test_records_run import recipe_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu asks that one")

SHORT = ("pretrain.steps=1", "anneal.steps=2", "evaluate.items=2", "checkpoint.every=100", "bpo.probe_every=0")
SFT = [*SHORT, "distill.steps=0", "bpo.steps=0"]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def agree(ours: Path, cpu: Path, relative: float) -> bool:
    pairs = zip(losses(ours), losses(cpu), strict=True)
    return all(torch.tensor(a).allclose(torch.tensor(b), rtol=relative, atol=1e-6) for a, b in pairs)


def test_the_device_is_like_a_gpu() -> None:
    with second_device() as waits:
        mine, hosts = torch.tensor([1.0, 2.0], device=SECOND), torch.tensor([3.0, 4.0])
        with pytest.raises(MixedDevices, match=r"mul.*float32 \[2\] of the CPU"):
            mine * hosts
        with pytest.raises(MixedDevices):
            torch.cat([mine, hosts])
        assert not waits
        assert (mine * hosts[0]).tolist() == [3, 6]
        assert waits == {"tolist": 1}
        assert (mine + hosts.to(SECOND)).sum().item() == 10 and waits["item"] == 1
        assert mine.cpu().tolist() == [1, 2] and waits["copy to the host"] == 1
        weight = torch.nn.Parameter(torch.zeros(2, device=SECOND))
        (weight * mine).sum().backward()
        assert isinstance(weight.grad, OnSecond) and weight.grad.tolist() == [1, 2]


def test_boards(tmp_path: Path) -> None:
    """Every stage of the demo: annotation by the model itself, BPO with a reference and recomputed log-probs."""
    bpo = ("bpo.steps=1", "bpo.kl_coef=0.01", "bpo.old_logprob=recompute", "bpo.importance=sequence")
    few = ("pretrain.batch_size=4", "bpo.prompts=2", "bpo.group_size=2", "bpo.max_new_tokens=5")
    recipe = load_recipe(SMALL[0], [*SMALL[1:], *SHORT, *bpo, "anneal.annotator=model", "anneal.batch_size=4", *few])
    with second_device() as waits:
        summary = run_recipe(recipe, tmp_path / "second")
    assert set(summary["after_bpo"]) and waits["tolist"] > 50
    run_recipe(recipe, tmp_path / "cpu")
    assert agree(tmp_path / "second", tmp_path / "cpu", 1e-4)


def records(folder: Path, family: str) -> str:
    """A recipe's file."""
    write_data(folder, 24)
    write_processor(folder / family, family)
    settings: dict[str, Any] = recipe_of(folder, family)
    settings["model"]["dtype"] = "bfloat16"
    settings["parallel"] = {"recompute": "full"}
    del settings["data"]["held_out_files"]  # evaluation is the boards' part
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_records_and_a_way_back_in(tmp_path: Path) -> None:
    file, longer = records(tmp_path, "r4b"), [*SFT, "anneal.steps=3"]
    with second_device() as waits:
        run_recipe(load_recipe(file, SFT), tmp_path / "second")
        assert waits["nonzero"] == 0
        run_recipe(load_recipe(file, longer), tmp_path / "second")
    run_recipe(load_recipe(file, longer), tmp_path / "cpu")
    assert len(losses(tmp_path / "second")) == 4
    assert agree(tmp_path / "second", tmp_path / "cpu", 2e-2)


def test_records_from_weights_with_a_teacher(tmp_path: Path) -> None:
    """A teacher that is asked on the fly, and rollouts of a model with DeepStack."""
    file, first = records(tmp_path, "qwen3_vl"), tmp_path / "first"
    teaching = [f"distill.teacher={first}", "distill.logit_weight=0.5", "distill.teacher_top_k=4", "distill.steps=1"]
    bpo = ["bpo.steps=1", "bpo.prompts=1", "bpo.bands={}", "bpo.max_new_tokens=5", "bpo.kl_coef=0.01"]
    with second_device():
        run_recipe(load_recipe(file, SFT), first)
        from_it = [*SHORT, "pretrain.steps=0", "anneal.steps=0", f"model.init_from={first}"]
        run_recipe(load_recipe(file, [*from_it, *teaching, *bpo]), tmp_path / "second")
    assert len(losses(tmp_path / "second")) == 2
