"""Processor: what turns samples into prompts and responses for the model of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from r4b_core.config.recipe import DataConfig, ModelConfig
from r4b_core.data import encoding
from r4b_core.data.chat import question_message, render
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.hf_tokenizer import HuggingFaceTokenizer
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import Tokenizer, ToyTokenizer
from r4b_core.models.families import resolve
from r4b_core.modes import IMAGE, NEWLINE

if TYPE_CHECKING:
    from r4b_core.models.qwen3_vl.processing import ImageSettings
    from r4b_core.models.r4b.processing import AnyRes

Size = tuple[int, int]
_IMAGE_TAG = {"r4b": IMAGE, "qwen3_vl": "<|image_pad|>"}


@dataclass(frozen=True)
class Processor:
    """The tokenizer, and a sample's prompt as the model family takes it.

    Attributes:
        encode_prompt: raises PromptError and ImageError for what cannot be a prompt.
        patch_values: C, values per patch.
        image_tokens: of a prompt's images by their sizes (height, width), how many tokens each becomes; None where
            prompts are not planned without their pixels (boards).
        image_mark: what stands in the text for each image, with one image token in it.
        after_image: what follows an image that the question does not place.
    """

    tokenizer: Tokenizer
    encode_prompt: Callable[[Sample], EncodedPrompt]
    patch_values: int
    image_tokens: Callable[[Sequence[Size]], list[int]] | None = None
    image_mark: str = IMAGE
    after_image: str = ""

    def prompt_length(self, question: str, sizes: Sequence[Size]) -> int:
        """Tokens of the prompt that `encode_prompt` makes, found without a pixel.

        Raises:
            PromptError, ImageError: as `encode_prompt`.
        """
        assert self.image_tokens is not None, "boards are encoded, not planned"
        rendered = render([question_message(question, len(sizes), self.after_image)], self.image_mark)
        return len(self.tokenizer.encode(rendered.text)) + sum(self.image_tokens(sizes)) - len(sizes)


def processor_of(model: ModelConfig, data: DataConfig) -> Processor:
    """The processor of a recipe: the words of the board task, or the tokenizer and image settings in a folder.

    Raises:
        ValueError: if the folder lacks a file or does not fit the model, or the family needs a folder.
    """
    shape = resolve(model)
    if model.processor is None:
        if data.task != "boards" or model.family != "r4b":
            raise ValueError(
                f"model.processor is not set, and data.task = {data.task} with model.family = {model.family} needs a "
                "tokenizer: give the folder of a checkpoint with tokenizer.json and preprocessor_config.json"
            )
        words = ToyTokenizer()
        return Processor(words, partial(encoding.encode_prompt, words, patch_size=shape.patch_size), shape.patch_dim)
    tokenizer = HuggingFaceTokenizer(model.processor, _IMAGE_TAG[model.family])
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"model.processor: {tokenizer.path} has {tokenizer.vocab_size} tokens and the model's table only "
            f"{shape.vocab_size}: set model.shape.vocab_size, or give the model's own tokenizer"
        )
    if model.family == "qwen3_vl":
        from r4b_core.models.qwen3_vl import processing as qwen3_vl

        images = qwen3_vl.read_settings(model.processor)
        images = replace(
            images,
            min_pixels=data.min_pixels or images.min_pixels,
            max_pixels=data.max_pixels or images.max_pixels,
        )
        found, expected = (images.patch_size, images.merge_size), (shape.patch_size, shape.merge_size)
        encode: Callable[[Sample], EncodedPrompt] = partial(qwen3_vl.encode_prompt, tokenizer, settings=images)
        count, mark, after = partial(_merged_blocks, settings=images), qwen3_vl.IMAGE_PLACEHOLDER, ""
    else:
        from r4b_core.models.r4b import processing as r4b

        if data.min_pixels or data.max_pixels:
            raise ValueError("data.min_pixels, data.max_pixels: R-4B tiles its images whatever their area; leave out")
        tiles = r4b.read_settings(model.processor, shape.patch_size)
        found, expected = tiles.side, shape.vision_grid[0]
        encode = partial(r4b.encode_prompt, tokenizer, settings=tiles)
        count, mark, after = partial(_tile_tokens, settings=tiles), IMAGE, NEWLINE
    if found != expected:
        raise ValueError(
            f"model.processor: {model.processor} cuts images into (patches, merge) {found} and the model takes "
            f"{expected}: give the folder of the same model"
        )
    return Processor(tokenizer, encode, shape.patch_dim, count, mark, after)


def _merged_blocks(sizes: Sequence[Size], settings: ImageSettings) -> list[int]:
    grids = [settings.grid(*size) for size in sizes]
    return [rows * columns // settings.merge_size**2 for _, rows, columns in grids]


def _tile_tokens(sizes: Sequence[Size], settings: AnyRes) -> list[int]:
    from r4b_core.models.r4b.processing import tiling

    if len(sizes) == 1:
        return [len(tiling(*sizes[0], settings).index(settings))]
    return [settings.patches_per_tile + 1] * len(sizes)
