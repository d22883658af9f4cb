"""From photographs and text to logits: R-4B against transformers' LLaVA-OneVision with R-4B's projector.

Both sides start from the same pixels and the same question, each with its own processing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.packing import Response, pack_sft
from r4b_core.data.schema import Sample
from r4b_core.models.r4b.config import resolve
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.models.r4b.processing import AnyRes, encode_prompt
from tests.models.build import SMALL
from tests.models.oracle import Oracle, make_oracle, to_megatron
from tests.models.processing_oracle import ByteTokenizer, onevision_image_processor, onevision_processor, photographs

TOKENIZER = ByteTokenizer("<image>")
SETTINGS = AnyRes(30, 7, ((30, 30), (30, 60), (60, 60), (60, 90)))
SHAPE = SMALL | dict(patch_size=7, vision_grid=(4, 4), vocab_size=320)
ANSWER = [5, 17, 256, 99]
CASES = {
    "text alone": ("What is the capital?", []),
    "one image": ("What is this?", ["china"]),
    "one tall image": ("Is <image> it?", ["portrait"]),
    "two images": ("Which is <image> and which <image>?", ["column", "flower"]),
}


class Projector(nn.Module):
    """R-4B's, from the oracle's parts."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.pre_norm, self.linear_1, self.linear_2 = oracle.pre_norm, oracle.linear_1, oracle.linear_2

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(self.pre_norm(features))))


def onevision(oracle: Oracle) -> LlavaOnevisionForConditionalGeneration:
    """transformers' model with the oracle's weights."""
    vision = oracle.vision_tower.config.to_dict() | {"image_size": SETTINGS.tile_size}
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=oracle.language_model.config.to_dict(),
        image_token_index=TOKENIZER.image_token,
        image_grid_pinpoints=[list(size) for size in SETTINGS.sizes],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_100000",
        tie_word_embeddings=oracle.shape.tie_embeddings,
    )
    config._attn_implementation = "eager"
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = Projector(oracle)
    tower = oracle.vision_tower.state_dict()
    tower["embeddings.position_embedding.weight"] = oracle.position.weight.detach()
    tower["embeddings.position_ids"] = model.model.vision_tower.embeddings.position_ids
    missing = model.model.vision_tower.load_state_dict(tower, strict=False)
    assert not [name for name in missing.missing_keys if "head" not in name and "position_ids" not in name]
    model.model.language_model.load_state_dict(oracle.language_model.model.state_dict())
    model.lm_head.load_state_dict(oracle.language_model.lm_head.state_dict())
    with torch.no_grad():
        model.model.image_newline.copy_(oracle.image_newline)
    return model


@pytest.fixture(scope="module")
def sides() -> tuple[R4BModel, Callable[[str, list[str]], Tensor]]:
    config = ModelConfig(shape=SHAPE)
    oracle = make_oracle(resolve(config))
    model = build_model(config, ParallelConfig(), seed=0)
    model.load_state_dict(to_megatron(dict(oracle.named_parameters()), oracle.shape), strict=False)
    theirs = onevision(oracle)
    images = onevision_image_processor(SETTINGS.sizes)
    images.size = {"height": SETTINGS.tile_size, "width": SETTINGS.tile_size}
    processor = onevision_processor(TOKENIZER, images, SETTINGS.patches_per_tile)

    def logits(text: str, names: list[str]) -> Tensor:
        marked = text if "<image>" in text else "<image>\n" * len(names) + text
        rendered = f"<|im_start|>user\n{marked}<|im_end|>\n<|im_start|>assistant\n<think>"
        pictures = [[Image.fromarray(photographs()[name]) for name in names]] if names else None
        inputs = processor(images=pictures, text=[rendered], return_tensors="pt")
        tokens = torch.cat([inputs["input_ids"], torch.tensor([ANSWER])], 1)
        inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            return theirs(**inputs).logits[0, -len(ANSWER) - 1 : -1]

    return model, logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, sides: tuple[R4BModel, Callable[[str, list[str]], Tensor]]) -> None:
    model, theirs = sides
    text, names = CASES[case]
    sample = Sample("a", "s", [photographs()[name] for name in names], text, "")
    (batch,) = pack_sft([(encode_prompt(TOKENIZER, sample, SETTINGS), Response(ANSWER))], 1000)
    got = model(batch) @ model.head_weight().T
    want = theirs(text, names)
    assert want.abs().max() > 1
    torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5)


def test_packed_logits_equal_transformers_one_by_one(
    sides: tuple[R4BModel, Callable[[str, list[str]], Tensor]],
) -> None:
    model, theirs = sides
    samples = [
        Sample(case, "s", [photographs()[name] for name in names], text, "") for case, (text, names) in CASES.items()
    ]
    items = [(encode_prompt(TOKENIZER, sample, SETTINGS), Response(ANSWER)) for sample in samples]
    (batch,) = pack_sft(items, 1000)
    got = (model(batch) @ model.head_weight().T).detach().view(len(CASES), len(ANSWER), -1)
    want = torch.stack([theirs(text, names) for text, names in CASES.values()])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
