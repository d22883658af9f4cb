"""`r4b convert`: what it passes on, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from r4b_core.cli.main import app
from r4b_core.config.recipe import ModelConfig
from r4b_core.evaluate.load import trained_model
from tests.cli.test_commands import environment
from tests.models.convert_cases import all_tensors, canonical, no_disk_waits, write_theirs  # noqa: F401
from tests.models.test_convert_parts import write_language, write_vision


def convert(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_there_and_back(tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path / "theirs", "qwen3_vl")
    result = convert("to-megatron", "--from", theirs, "--to", tmp_path / "megatron")
    assert result.exit_code == 0, result.output
    first, _, rest = result.stdout.partition("\n")
    assert first == f"{tmp_path / 'megatron'}: qwen3_vl, size toy, float32"
    # What is printed is the section that a recipe needs.
    model = ModelConfig.model_validate(yaml.safe_load(rest)["model"])
    assert model.init_from == model.processor == str(tmp_path / "megatron")
    for source in (tmp_path / "megatron", tmp_path / "megatron/checkpoints/pretrain/step_00000000"):
        target = tmp_path / source.name / "back"
        result = convert("to-hf", "--from", source, "--to", target, "--shard-size", 0.1)
        assert result.exit_code == 0, result.output
        back, want = all_tensors(target), canonical(theirs, "qwen3_vl")
        assert back.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in back.items())


def test_from_parts(tmp_path: Path) -> None:
    vision, language = write_vision(tmp_path / "vision"), write_language(tmp_path / "language", tie=True)
    arguments = ("--vision", vision, "--language", language, "--to", tmp_path / "r4b", "--dtype", "bfloat16")
    result = convert("to-megatron", "--init", "from-parts", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'r4b'}: r4b, size toy, bfloat16\n")
    # The folder is one that `r4b generate` and `r4b eval` open.
    table = all_tensors(language)["model.embed_tokens.weight"].bfloat16()
    with trained_model(tmp_path / "r4b") as trained:
        assert torch.equal(trained.model.embedding.word_embeddings.weight, table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "x"), "--init checkpoint takes --from, not none"),
        (("--to", "x", "--from", "y", "--vision", "z"), "--init checkpoint takes --from, not --from and --vision"),
        (("--to", "x", "--init", "from-parts", "--vision", "z"), "from-parts takes --vision and --language"),
        (("--from", "y"), "Missing option '--to'"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    result = convert("to-megatron", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_what_megatron_warns_of_is_not_passed_on(tmp_path: Path) -> None:
    options = ["convert", "to-hf", "--from", tmp_path, "--to", tmp_path / "out"]
    command = [sys.executable, "-m", "r4b_core.cli.main", *options]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    result = convert("to-megatron", "--from", tmp_path, "--to", tmp_path / "out")
    assert result.exit_code == 2
    assert (
        result.stderr == f"error: {tmp_path / 'config.json'} is missing: give the folder of a Hugging Face checkpoint\n"
    )
    result = convert("to-hf", "--from", tmp_path, "--to", tmp_path / "out")
    assert result.exit_code == 2 and "neither a run folder nor a checkpoint in one" in result.stderr
    assert not (tmp_path / "out").exists()
