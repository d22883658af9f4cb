"""A Hugging Face checkpoint straight into a model: logits equal transformers', and what cannot be loaded is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from r4b_core.config.recipe import ParallelConfig
from r4b_core.models.convert import ConversionError, load_weights, read_config
from r4b_core.models.families import build_model, resolve
from tests.models.convert_cases import SHAPES, edit_config, logits_pair, rewrite, their_model, write_theirs


def load(folder: Path) -> Any:
    model = build_model(read_config(folder), ParallelConfig(), seed=5)
    load_weights(model, folder)
    return model


@pytest.mark.parametrize(("family", "tie"), [("r4b", True), ("r4b", False), ("qwen3_vl", True), ("qwen3_vl", False)])
def test_logits_equal_transformers(family: str, tie: bool, tmp_path: Path) -> None:
    got, want = logits_pair(family, load(write_theirs(tmp_path, family, tie)), their_model(family, tie))
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SHAPES)
def test_the_configuration_gives_the_shape_and_the_type_of_the_weights(family: str, tmp_path: Path) -> None:
    config = read_config(write_theirs(tmp_path, family, tie=False, dtype=torch.bfloat16))
    assert (config.family, config.dtype, config.processor) == (family, "bfloat16", str(tmp_path.resolve()))
    shape = resolve(config)
    for name, value in SHAPES[family].items():
        found = getattr(shape, name)
        assert (list(found) if isinstance(found, tuple) else found) == (
            list(value) if isinstance(value, tuple) else value
        ), name


def test_rope_settings_of_transformers_4(tmp_path: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        text = config["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope

    write_theirs(tmp_path, "qwen3_vl")
    before = read_config(tmp_path)
    edit_config(tmp_path, older)
    assert read_config(tmp_path) == before


def test_a_model_of_another_shape_is_not_filled(tmp_path: Path) -> None:
    config = read_config(write_theirs(tmp_path, "r4b"))
    other = config.model_copy(update={"shape": {**config.shape, "num_layers": 2, "rope_theta": 1e4}})
    with pytest.raises(ConversionError, match=r"num_layers = 3 instead of 2; rope_theta = 5000.0 instead of 10000.0"):
        load_weights(build_model(other, ParallelConfig(), 0), tmp_path)


def test_names_of_older_transformers_are_known(tmp_path: Path) -> None:
    write_theirs(tmp_path, "r4b", tie=False)
    before = load(tmp_path).state_dict()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
            tensors[old.replace("lm_head.", "language_model.lm_head.")] = tensors.pop(name)

    rewrite(tmp_path, rename)
    after = load(tmp_path).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if isinstance(value, torch.Tensor))
