"""Small Hugging Face checkpoints of both families, written by transformers, and what is asked of a conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from r4b_core.config.recipe import ModelConfig
from r4b_core.data.packing import Response, pack_sft
from r4b_core.data.schema import Sample
from r4b_core.models.convert.huggingface import convert_module
from r4b_core.models.families import resolve
from r4b_core.models.r4b.processing import AnyRes, encode_prompt
from tests.models import build, qwen3_vl_oracle
from tests.models.processing_oracle import ByteTokenizer, onevision_image_processor, onevision_processor, photographs

TOKENIZER = ByteTokenizer("<image>")
TILES = AnyRes(30, 7, ((30, 30), (30, 60), (60, 60), (60, 90)))
R4B_SHAPE: dict[str, Any] = {**build.SMALL, "patch_size": 7, "vision_grid": [4, 4], "vocab_size": 320}
SHAPES = {"r4b": R4B_SHAPE, "qwen3_vl": qwen3_vl_oracle.SMALL}


class Projector(nn.Module):
    """What R-4B has in place of LLaVA-OneVision's projector."""

    def __init__(self, vision: int, text: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(vision, eps=1e-6)
        self.linear_1 = nn.Linear(vision, text)
        self.linear_2 = nn.Linear(text, text)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(self.pre_norm(features))))


class TheirR4B(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with R-4B's projector, as vLLM builds it."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size)


THEIRS = {"r4b": TheirR4B, "qwen3_vl": Qwen3VLForConditionalGeneration}


def their_r4b_config(tie: bool, **changed: Any) -> LlavaOnevisionConfig:
    shape = resolve(ModelConfig(shape={**R4B_SHAPE, **changed}))
    return LlavaOnevisionConfig(
        text_config=dict(
            model_type="qwen3",
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_parameters=dict(rope_type="default", rope_theta=shape.rope_theta),
            tie_word_embeddings=tie,
        ),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=shape.vision_hidden_size,
            intermediate_size=shape.vision_ffn_hidden_size,
            num_hidden_layers=shape.vision_num_layers,
            num_attention_heads=shape.vision_num_heads,
            patch_size=shape.patch_size,
            image_size=TILES.tile_size,
            vision_use_head=False,
        ),
        image_token_index=TOKENIZER.image_token,
        image_grid_pinpoints=[list(size) for size in TILES.sizes],
        vision_aspect_ratio="anyres_max_100000",
        tie_word_embeddings=tie,
    )


def their_model(family: str, tie: bool, seed: int = 0, **changed: Any) -> nn.Module:
    """Random weights everywhere, norms and biases too; ``changed`` are fields of the shape."""
    if family == "qwen3_vl":
        shape = resolve(ModelConfig(family=family, shape={**SHAPES[family], "tie_embeddings": tie, **changed}))
        return qwen3_vl_oracle.make_oracle(shape, seed)
    config = their_r4b_config(tie, **changed)
    config._attn_implementation = "eager"
    model = TheirR4B(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


@pytest.fixture(autouse=True)
def no_disk_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read by this machine before it loses its power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}',
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


def write_theirs(
    folder: Path, family: str, tie: bool = True, dtype: torch.dtype = torch.float32, **changed: Any
) -> Path:
    """A checkpoint as transformers saves it, in several shards."""
    logging.disable_progress_bar()
    model = their_model(family, tie, **changed).to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    if family == "r4b":
        edit_config(folder, lambda config: config.update(architectures=["RForConditionalGeneration"]))
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    return folder


ANSWER = [5, 17, 56, 9]


@torch.no_grad()
def logits_pair(family: str, ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits [n, V] of an answer about an image (R-4B: a photograph, from each side's own processing)."""
    if family == "qwen3_vl":
        shape = ours.shape
        prompt = qwen3_vl_oracle.random_prompt(torch.Generator().manual_seed(3), shape, 2, [(4, 6), (2, 2)], 3)
        want = qwen3_vl_oracle.their_logits(theirs, shape, prompt, ANSWER)
    else:
        picture = photographs()["china"]
        prompt = encode_prompt(TOKENIZER, Sample("a", "s", [picture], "What is this?", ""), TILES)
        images = onevision_image_processor(TILES.sizes)
        images.size = {"height": TILES.tile_size, "width": TILES.tile_size}
        processor = onevision_processor(TOKENIZER, images, TILES.patches_per_tile)
        text = "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n<think>"
        inputs = processor(images=[[Image.fromarray(picture)]], text=[text], return_tensors="pt")
        tokens = torch.cat([inputs["input_ids"], torch.tensor([ANSWER])], 1)
        inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        want = theirs(**inputs).logits[0, -len(ANSWER) - 1 : -1]
    (batch,) = pack_sft([(prompt, Response(ANSWER))], 1000)
    return ours(batch) @ ours.head_weight().T, want


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def canonical(folder: Path, family: str) -> dict[str, Tensor]:
    """All tensors by the names that a conversion writes."""
    rename = convert_module(family).canonical
    return {rename(name): x for name, x in all_tensors(folder).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint, which becomes one file."""
    tensors = all_tensors(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
