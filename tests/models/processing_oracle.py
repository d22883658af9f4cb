"""transformers' processors, photographs to feed them, and a tokenizer that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

QWEN_TAGS = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "<|endoftext|>",
)


class ByteTokenizer:
    """Every byte and every tag is one token; tags are found in any text, as Qwen's tokenizer finds them."""

    def __init__(self, image: str, tags: Sequence[str] = QWEN_TAGS) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        self.pretrained = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        self.pretrained.add_special_tokens({"additional_special_tokens": list(dict.fromkeys([*tags, image]))})
        self.pretrained.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
        self.image_token = self.pretrained.convert_tokens_to_ids(image)

    def encode(self, text: str) -> list[int]:
        return self.pretrained.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.pretrained.decode(ids)


@cache
def photographs() -> dict[str, np.ndarray]:
    """Two photographs, and pieces of them in odd shapes; uint8 [height, width, 3]."""
    china, flower = (np.array(image) for image in load_sample_images().images)

    def scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))

    return {
        "china": china,
        "flower": flower,
        "portrait": np.ascontiguousarray(china.transpose(1, 0, 2)[:, :301]),
        "strip": np.ascontiguousarray(flower[150:187, :]),
        "column": np.ascontiguousarray(china[:, 300:343]),
        "thumbnail": scaled(flower, 31, 47),
        "large": scaled(china, 1001, 1499),
        "square": np.ascontiguousarray(flower[:427, 100:527]),
        "pixel": china[200:201, 200:201].copy(),
        "whole patches": np.ascontiguousarray(flower[:384, :384]),
    }


def qwen_image_processor(min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """The image processor that Qwen3-VL uses, as its checkpoints set it up, without torchvision."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )


def onevision_image_processor(pinpoints: Sequence[tuple[int, int]] | None = None) -> LlavaOnevisionImageProcessorPil:
    """LLaVA-OneVision's, with SigLIP's normalisation."""
    more: dict[str, Any] = {"image_grid_pinpoints": [list(size) for size in pinpoints]} if pinpoints else {}
    return LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, **more)


def qwen_processor(tokenizer: ByteTokenizer, images: Qwen2VLImageProcessorPil) -> Qwen3VLProcessor:
    return _StillsOnly.of(Qwen3VLProcessor)(image_processor=images, tokenizer=tokenizer.pretrained)


def onevision_processor(
    tokenizer: ByteTokenizer, images: LlavaOnevisionImageProcessorPil, features: int
) -> LlavaOnevisionProcessor:
    """With no cap on the tiles, as R-4B has none."""
    return _StillsOnly.of(LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tokenizer.pretrained,
        num_image_tokens=features,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_100000",
    )


class _StillsOnly:
    """A processor without its video processor, which needs torchvision."""

    @staticmethod
    def of(processor: type) -> type:
        return type(processor.__name__, (processor,), {"check_argument_for_proper_class": lambda *_: None})
