"""R-4B from a SigLIP and a Qwen3 checkpoint: each part is what it was, what is new does not depend on the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from r4b_core.config.recipe import DataConfig, ParallelConfig
from r4b_core.data.packing import Response, pack_sft
from r4b_core.data.schema import Sample
from r4b_core.models.convert import ConversionError, find_like, to_huggingface
from r4b_core.models.convert.huggingface import model_of
from r4b_core.models.convert.parts import from_parts, joined_config
from r4b_core.models.families import build_model, resolve
from r4b_core.models.processor import processor_of
from r4b_core.models.r4b.processing import AnyRes
from r4b_core.modes import BLANK_LINE
from r4b_core.parallel import checkpoint
from r4b_core.telemetry.locate import locate
from tests.models.convert_cases import ANSWER, TheirR4B, all_tensors, no_disk_waits  # noqa: F401
from tests.models.processing_oracle import QWEN_TAGS, ByteTokenizer, photographs

VISION: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, patch_size=7, image_size=30
)
TEXT: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_parameters=dict(rope_type="default", rope_theta=5e3),
    initializer_range=0.1,
)


@pytest.fixture
def language(tmp_path: Path) -> Path:
    return write_language(tmp_path / "language", tie=True)


def write_language(folder: Path, tie: bool, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    logging.disable_progress_bar()
    torch.manual_seed(1)
    Qwen3ForCausalLM(Qwen3Config(**TEXT, tie_word_embeddings=tie, **changed)).to(dtype).save_pretrained(folder)
    ByteTokenizer(QWEN_TAGS[0], (*QWEN_TAGS, BLANK_LINE)).pretrained.save_pretrained(folder)
    return folder


def write_vision(folder: Path, whole: bool = False) -> Path:
    torch.manual_seed(2)
    if whole:
        text = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3, vocab_size=99)
        SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("whole", "tie"), [(True, True), (False, False)])
def test_each_part_is_what_it_was(whole: bool, tie: bool, tmp_path: Path) -> None:
    vision, language = write_vision(tmp_path / "vision", whole), write_language(tmp_path / "language", tie)
    config = from_parts(vision, language, tmp_path / "r4b", seed=3)
    shape = resolve(config)
    assert (shape.vision_num_layers, shape.vocab_size, shape.tie_embeddings) == (2, 320, tie)
    path = locate(tmp_path / "r4b")[0]
    to_huggingface(path, config, find_like(tmp_path / "r4b", config), tmp_path / "hf")
    theirs = TheirR4B.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()

    pixels = torch.randn(1, 3, 30, 30)
    want = SiglipVisionModel.from_pretrained(vision)(pixels, output_hidden_states=True)
    got = theirs.model.vision_tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(got.hidden_states[-1], want.hidden_states[-2])
    assert torch.equal(theirs.model.vision_tower.post_layernorm.weight, torch.ones(24))
    tokens = torch.tensor([ANSWER])
    torch.testing.assert_close(
        theirs(input_ids=tokens).logits, Qwen3ForCausalLM.from_pretrained(language)(input_ids=tokens).logits
    )

    # What is new is what a model that starts from nothing has, whatever the layout.
    model = build_model(config, ParallelConfig(), seed=3)
    new = {name: x.clone() for name, x in model.named_parameters() if name.startswith(("projector.", "image_newline"))}
    checkpoint.load_weights(path, [model])
    assert len(new) == 7 and all(torch.equal(dict(model.named_parameters())[name], x) for name, x in new.items())


def test_photographs_and_text_go_through_the_new_model(tmp_path: Path, language: Path) -> None:
    """The folder brings all that a recipe needs: weights, the tokenizer with ``<image>``, and the sizes of tiles."""
    config = from_parts(write_vision(tmp_path / "vision"), language, tmp_path / "r4b")
    processor = processor_of(config, DataConfig(task="records"))
    assert processor.tokenizer.image_token == 266 < resolve(config).vocab_size
    prompt = processor.encode_prompt(Sample("a", "s", [photographs()["flower"]], "What is <image>?", ""))
    assert int((prompt.tokens == processor.tokenizer.image_token).sum()) == int((prompt.vision_index != -1).sum()) > 16
    model = build_model(config, ParallelConfig(), seed=0)
    checkpoint.load_weights(locate(tmp_path / "r4b")[0], [model])
    (batch,) = pack_sft([(prompt, Response(ANSWER))], 10_000)
    hidden = model(batch)
    assert hidden.shape == (len(ANSWER), 48) and hidden.isfinite().all()


def test_the_type_is_the_language_models_or_what_is_asked_for(tmp_path: Path) -> None:
    vision, language = write_vision(tmp_path / "vision"), write_language(tmp_path / "language", True, torch.bfloat16)
    table = all_tensors(language)["model.embed_tokens.weight"]
    for dtype in (None, "float32"):
        config = from_parts(vision, language, tmp_path / str(dtype), dtype=dtype)
        assert config.dtype == (dtype or "bfloat16")
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["text_config"]["dtype"] == config.dtype
        model = build_model(config, ParallelConfig(), seed=0)
        checkpoint.load_weights(locate(tmp_path / str(dtype))[0], [model])
        weight = model.embedding.word_embeddings.weight
        assert weight.dtype == getattr(torch, config.dtype) and torch.equal(weight, table.to(weight.dtype))


def test_a_tokenizer_that_has_the_tag_keeps_its_bytes(tmp_path: Path, language: Path) -> None:
    ByteTokenizer("<image>").pretrained.save_pretrained(language)
    from_parts(write_vision(tmp_path / "vision"), language, tmp_path / "r4b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "r4b" / name).read_bytes() == (language / name).read_bytes()


def test_the_published_backbones_make_the_size_4b() -> None:
    """SigLIP2-So400m-patch14-384 and Qwen3-4B, without the fields that have transformers' defaults."""
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
    vision |= dict(patch_size=14, image_size=384)
    text = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8, rope_theta=1e6)
    config = joined_config(vision, text | {"tie_word_embeddings": True}, 151669)
    model = model_of(config, Path("config.json"))
    assert (model.family, model.size, model.shape) == ("r4b", "4b", {})
    sizes = {tuple(size) for size in config["image_grid_pinpoints"]}
    assert sizes == set(AnyRes().sizes)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, language: Path) -> None:
    vision, target = write_vision(tmp_path / "vision"), tmp_path / "r4b"
    with pytest.raises(ConversionError, match=r"--vision .*model_type = 'qwen3', expected siglip or"):
        from_parts(language, language, target)
    with pytest.raises(ConversionError, match=r"--language .*model_type = 'siglip_vision_model', expected 'qwen3'"):
        (vision / "tokenizer.json").write_bytes((language / "tokenizer.json").read_bytes())
        from_parts(vision, vision, target)
    settings = json.loads((vision / "config.json").read_text())
    for changed, message in (
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1, and all layers but the last are used"),
        ({"image_size": [30, 30]}, r"image_size = \[30, 30\] is not a whole number"),
        ({"hidden_act": "relu"}, r"vision_config.hidden_act = 'relu'; the model is built for 'gelu_pytorch_tanh'"),
        ({"num_hidden_layers": 5}, r"vision_model.encoder.layers.3.layer_norm1.weight: missing"),
    ):
        (vision / "config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(ConversionError, match=message):
            from_parts(vision, language, target)
    (vision / "config.json").write_text(json.dumps(settings))
    (language / "tokenizer.json").rename(language / "elsewhere")
    with pytest.raises(ConversionError, match=r"tokenizer.json is missing"):
        from_parts(vision, language, target)
    (language / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ConversionError, match=r"tokenizer.json is not a tokenizer of the kind that Qwen3 has"):
        from_parts(vision, language, target)
    (language / "elsewhere").rename(language / "tokenizer.json")
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | {"vocab_size": 266}))
    with pytest.raises(ConversionError, match=r"no room for <image>: it would be token 266, and vocab_size is 266"):
        from_parts(vision, language, target)
    (language / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"(?s)11 problems.*model.layers.2.self_attn.q_proj.weight: missing"):
        from_parts(vision, language, target)
    assert not target.exists() and not target.with_name("r4b.partial").exists()
