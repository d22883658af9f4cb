"""`r4b plan`: what it prints, when it exits 1, and which mistakes it names."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from r4b_core.cli.main import app

REAL = ("smoke", "model.size=4b", "model.dtype=bfloat16")


def plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_help_is_among_the_commands() -> None:
    assert "plan" in CliRunner().invoke(app, ["--help"]).output
    assert plan("--help").exit_code == 0


def test_prints_memory_time_and_layouts_and_that_nothing_was_measured() -> None:
    result = plan(*REAL, "--gpus", "8")
    assert result.exit_code == 0, result.output
    for words in (
        "r4b-4b, 4.430 B parameters, on 8 x h100",
        "memory per GPU",
        "optimizer",
        "rollout",
        "seconds per step",
        "matrix products",
        "layout(s) fit",
        "tokens/s/GPU",
        "r4b has not been measured on GPUs",
    ):
        assert words in result.output, words


def test_says_why_a_layout_is_impossible() -> None:
    assert "parallel.pp = 8: does not divide the 36 layers" in plan(*REAL).output


def test_nothing_fits_is_exit_1_with_the_nearest() -> None:
    result = plan(*REAL, "packing.capacity=65536", "anneal.batch_size=512", "--gpus", "1", "--recompute", "full")
    assert result.exit_code == 1
    assert "nothing fits: nearest is tp 1 pp 1 cp 1 dp 1: needs" in result.output and "too much" in result.output


def test_a_larger_gpu_fits_more() -> None:
    def fits(gpu: str) -> int:
        output = plan(
            "smoke", "packing.capacity=16384", "anneal.batch_size=512", "--model", "qwen3_vl-8b", "--gpu", gpu
        )
        line = next(line for line in output.output.splitlines() if "layout(s) fit," in line)
        return int(line.split()[0])

    assert fits("h100") < fits("h200")


def test_wrong_values_are_exit_2_with_the_nearest_choice() -> None:
    cases = {
        ("parallel.pp=5",): "parallel.pp = 5: does not divide the 36 layers of the decoder; the nearest that does is 4",
        ("parallel.tp=3",): "parallel.tp = 3: does not divide the 32 attention heads; the nearest that does is 2",
        ("parallel.cp=16",): "the nearest that divides both is 8",
        ("--gpus", "12"): "--gpus 12: must be 1 to 8, or whole nodes of 8; try 8",
        ("--model", "gpt"): "there is no shape of 'gpt'",
        ("--text-tokens", "4000"): "packing.capacity = 2048: a sample of",
    }
    for arguments, message in cases.items():
        result = plan(*REAL, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_what_the_recipe_says_is_planned() -> None:
    given = ("parallel.recompute=selective", "parallel.pp=2", "parallel.virtual_stages=3")
    told = plan(*REAL, *given).output
    assert "parallel.recompute = selective, as the recipe says" in told
    assert "parallel.virtual_stages = 3 in pipelines, as the recipe says" in told
    assert "as the recipe says" not in plan(*REAL).output
    what_if = plan(*REAL, *given, "--recompute", "full").output
    assert "the recipe says parallel.recompute = selective; this plan asks what if" in what_if


def test_recompute_is_tried_where_asked() -> None:
    large = (*REAL, "packing.capacity=32768", "anneal.batch_size=2048", "--gpus", "1", "--gpu", "h200")
    without = plan(*large, "--recompute", "none")
    assert without.exit_code == 1 and "with recompute none" in without.output
    auto = plan(*large, "--recompute", "auto")
    assert auto.exit_code == 0 and "recompute full" in auto.output
