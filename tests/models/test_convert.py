"""Whole checkpoints there and back: bit for bit, in any layout's parts, and under the names that others read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import Qwen3ForCausalLM, SiglipVisionModel

from r4b_core.config.recipe import ModelConfig, ParallelConfig, Recipe
from r4b_core.models.convert import find_like, megatron, read_config, to_huggingface, to_megatron
from r4b_core.models.convert.files import Stream
from r4b_core.models.convert.huggingface import BYTES, model_of
from r4b_core.models.convert.rules import rule
from r4b_core.models.convert.run import RECIPE
from r4b_core.models.families import build_model, resolve
from r4b_core.parallel import checkpoint
from r4b_core.telemetry import run as telemetry_run
from r4b_core.telemetry.locate import locate
from tests.models import oracle, qwen3_vl_oracle
from tests.models.convert_cases import (
    COMPANIONS,
    SHAPES,
    THEIRS,
    Projector,
    all_tensors,
    canonical,
    edit_config,
    logits_pair,
    no_disk_waits,  # noqa: F401
    rewrite,
    their_model,
    write_theirs,
)

FAMILIES = list(SHAPES)


def there_and_back(theirs: Path, folder: Path) -> Path:
    """In several parts and several shards."""
    model = to_megatron(theirs, folder / "megatron", part_bytes=100_000)
    path, _ = locate(folder / "megatron")
    like = find_like(folder / "megatron", model)
    to_huggingface(path, model, like, folder / "back", shard_bytes=90_000)
    return folder / "back"


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_for_bit(family: str, tie: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path / "theirs", family, tie, dtype)
    back = there_and_back(theirs, tmp_path)
    assert_same_tensors(all_tensors(back), canonical(theirs, family))
    assert len(list(back.glob("*.safetensors"))) > 1
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == all_tensors(back).keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in all_tensors(back).values())
    for folder in (tmp_path / "megatron", back):
        for name in (*COMPANIONS, "config.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_export(family: str, tmp_path: Path) -> None:
    back = there_and_back(write_theirs(tmp_path / "theirs", family, tie=False), tmp_path)
    theirs, report = THEIRS[family].from_pretrained(back, output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = build_model(read_config(back), ParallelConfig(), seed=5)
    checkpoint.load_weights(locate(tmp_path / "megatron")[0], [model])
    got, want = logits_pair(family, model, theirs.eval())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    _, before = logits_pair(family, model, their_model(family, tie=False))
    assert torch.equal(want, before)


def oracle_parameters(family: str, tensors: dict[str, Tensor], shape: Any) -> dict[str, Tensor]:
    """The parameters by the tests' own mapping."""
    if family == "qwen3_vl":
        return qwen3_vl_oracle.to_megatron(tensors, shape)
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head.", "language_model.lm_head."
        )
        new = new.replace("model.vision_tower.vision_model.", "vision_tower.").removeprefix(
            "model.multi_modal_projector."
        )
        renamed[new.removeprefix("model.").replace("vision_tower.embeddings.position_embedding", "position")] = value
    return oracle.to_megatron(renamed, shape)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_holds_what_an_independent_mapping_says(family: str, tie: bool, tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path / "theirs", family, tie)
    config = to_megatron(theirs, tmp_path / "megatron", part_bytes=100_000)
    model = build_model(config, ParallelConfig(), seed=5)
    checkpoint.load_weights(locate(tmp_path / "megatron")[0], [model])
    want = oracle_parameters(family, canonical(theirs, family), resolve(config))
    assert_same_tensors({name: x.detach() for name, x in model.named_parameters()}, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_a_run_to_start_from(family: str, tmp_path: Path) -> None:
    config = to_megatron(write_theirs(tmp_path / "theirs", family), tmp_path / "megatron")
    assert RECIPE == telemetry_run.RECIPE
    path, recipe_path = locate(tmp_path / "megatron")
    recipe = Recipe.model_validate(yaml.safe_load(recipe_path.read_text()))
    assert recipe.model == config and config.processor == str(tmp_path / "megatron")
    assert checkpoint.read_state(path)["step"] == 0
    assert locate(path) == (path, recipe_path)


def test_all_frames_of_the_patch_convolution_are_kept(tmp_path: Path) -> None:
    """Qwen3-VL repeats a still image, and the model here could have summed the frames' weights."""
    theirs = write_theirs(tmp_path / "theirs", "qwen3_vl")
    weight = all_tensors(theirs)["model.visual.patch_embed.proj.weight"]
    assert weight.dim() == 5 and weight.shape[2] == 2 and not torch.equal(weight[:, :, 0], weight[:, :, 1])
    back = all_tensors(there_and_back(theirs, tmp_path))
    assert torch.equal(back["model.visual.patch_embed.proj.weight"], weight)


def test_a_parameter_is_written_without_the_memory_it_is_a_view_of() -> None:
    stream = Stream(io.BytesIO(), lambda count: None)
    rows = torch.randn(5000, 8)
    megatron.write_rules(stream, [rule("a", "b", 2, 8)], lambda name: rows[3:5], torch.float32)
    assert stream.position < 2 * megatron.OVERHEAD


# vllm-project/vllm, vllm/model_executor/models/rvl.py, RForConditionalGeneration.hf_to_vllm_mapper: prefixes in order.
VLLM_MAPPER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


@pytest.mark.parametrize("tie", [True, False])
def test_vllm_finds_a_module_for_every_name_of_an_r4b_export(tie: bool, tmp_path: Path) -> None:
    """Its modules: siglip.py's SiglipVisionModel (one ``vision_model``), rvl.py's projector, Qwen3ForCausalLM."""
    back = there_and_back(write_theirs(tmp_path / "theirs", "r4b", tie), tmp_path)
    config = THEIRS["r4b"].config_class.from_pretrained(back)
    modules = {
        "vision_tower.vision_model.": SiglipVisionModel(config.vision_config),
        "multi_modal_projector.": Projector(config.vision_config.hidden_size, config.text_config.hidden_size),
        "language_model.": Qwen3ForCausalLM(config.text_config),
    }
    known = {prefix + name for prefix, module in modules.items() for name, _ in module.named_parameters()}
    known |= {"image_newline", *(() if tie else ("language_model.lm_head.weight",))}
    mapped = set()
    for name in all_tensors(back):
        for old, new in VLLM_MAPPER.items():
            if name.startswith(old):
                name = name.replace(old, new, 1)
        mapped.add(name)
    assert mapped == known


def test_a_trained_checkpoint_takes_its_configuration_from_elsewhere(tmp_path: Path) -> None:
    """A run's folder has no config.json: it is where the recipe's processor is, or --like names it."""
    theirs = write_theirs(tmp_path / "theirs", "qwen3_vl", dtype=torch.bfloat16)
    model = to_megatron(theirs, tmp_path / "megatron")
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "megatron" / "checkpoints", run / "checkpoints")
    assert find_like(run, model) == tmp_path / "megatron"
    assert find_like(run, model, theirs) == theirs
    with pytest.raises(ValueError, match=r"no config.json in .*run: give .* --like DIR"):
        find_like(run, model.model_copy(update={"processor": None}))


def places(path: Path) -> list[tuple[str, int]]:
    """Type and place of each tensor of a safetensors file, from its header."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [(entry["dtype"], entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"]


def test_what_the_model_does_not_use_is_carried_along(tmp_path: Path) -> None:
    """A vision tower of three layers, of which the last is not looked at, with its pooling head."""
    theirs = write_theirs(tmp_path / "theirs", "r4b", dtype=torch.bfloat16)

    def add_layer(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            if ".encoder.layers.1." in name:
                tensors[name.replace(".layers.1.", ".layers.2.")] = value + 1
        # Of other types, and before them an odd number of bytes.
        tensors["model.vision_tower.head.flag"] = torch.tensor([True, False, True])
        tensors["model.vision_tower.head.probe"] = torch.randn(1, 1, 23, dtype=torch.float64)
        tensors["model.vision_tower.embeddings.position_ids"] = torch.arange(16)[None]

    rewrite(theirs, add_layer)
    edit_config(theirs, lambda x: (x.update(vision_feature_layer=-2), x["vision_config"].update(num_hidden_layers=3)))
    assert resolve(read_config(theirs)).vision_num_layers == 2
    back = there_and_back(theirs, tmp_path)
    assert_same_tensors(all_tensors(back), canonical(theirs, "r4b"))

    unused = tmp_path / "megatron" / "unused.safetensors"
    assert all(start % BYTES[dtype] == 0 for dtype, start in places(unused))
    unused.unlink()
    path, recipe = locate(tmp_path / "megatron")
    model = ModelConfig.model_validate(yaml.safe_load(recipe.read_text())["model"])
    with pytest.raises(
        ValueError, match=r"(?s)--like:.*vision_model.encoder.layers.2.self_attn.q_proj.weight: missing"
    ):
        to_huggingface(path, model, tmp_path / "megatron", tmp_path / "again")
    to_huggingface(path, model, theirs, tmp_path / "again", shard_bytes=90_000)
    assert_same_tensors(all_tensors(tmp_path / "again"), canonical(theirs, "r4b"))


def test_a_head_that_repeats_the_embeddings_is_dropped(tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path / "theirs", "qwen3_vl", tie=True)
    table = "model.language_model.embed_tokens.weight"
    rewrite(theirs, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    back = all_tensors(there_and_back(theirs, tmp_path))
    assert "lm_head.weight" not in back and len(back) == len(all_tensors(theirs)) - 1


def test_the_type_in_the_configuration_follows_the_weights(tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path / "theirs", "r4b")
    edit_config(theirs, lambda config: config.update(dtype="bfloat16"))
    assert read_config(theirs).dtype == "float32"
    back = there_and_back(theirs, tmp_path)
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_published_sizes_are_found_by_their_shape() -> None:
    """Qwen3-VL 2B, 4B and 8B; R-4B's vision tower and decoder."""
    eyes = dict(
        hidden_act="gelu_pytorch_tanh", patch_size=16, temporal_patch_size=2, spatial_merge_size=2, in_channels=3
    )
    eyes |= dict(num_heads=16, num_position_embeddings=2304)
    small = eyes | dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
    large = eyes | dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    rope = dict(rope_type="default", mrope_interleaved=True, mrope_section=[24, 20, 20])
    words = dict(head_dim=128, num_key_value_heads=8, vocab_size=151936, rope_theta=5e6, rope_scaling=rope)
    for size, vision, layers, hidden, ffn, heads, tie in (
        ("2b", small, 28, 2048, 6144, 16, True),
        ("4b", small, 36, 2560, 9728, 32, True),
        ("8b", large, 36, 4096, 12288, 32, False),
    ):
        text = words | dict(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads
        )
        config = dict(architectures=["Qwen3VLForConditionalGeneration"], tie_word_embeddings=tie, text_config=text)
        config["vision_config"] = vision | dict(out_hidden_size=hidden)
        found = model_of(config, Path("config.json"))
        assert (found.family, found.size, found.shape) == ("qwen3_vl", size, {})
    # Values that transformers leaves out of a nested configuration, being its defaults, are Qwen3's.
    text = dict(model_type="qwen3", num_hidden_layers=36, hidden_size=2560, intermediate_size=9728, rope_theta=1e6)
    text |= dict(num_key_value_heads=8, tie_word_embeddings=True)
    vision = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26)
    vision |= dict(num_attention_heads=16, patch_size=14, image_size=384)
    config = dict(architectures=["RForConditionalGeneration"], text_config=text, vision_config=vision)
    found = model_of(config, Path("config.json"))
    assert (found.family, found.size, found.shape) == ("r4b", "4b", {})
