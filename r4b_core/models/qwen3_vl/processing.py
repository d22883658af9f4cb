"""Qwen3-VL's inputs: images to patches, and chat messages to tokens, equal to transformers' processors.

The tags are those of Qwen's tokenizer; image limits are read from a checkpoint's ``preprocessor_config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r4b_core.data.chat import (
    Message,
    TextEncoder,
    check_image_count,
    place_images,
    question_message,
    render,
)
from r4b_core.data.images import ImageError
from r4b_core.data.processing import check_pixels, for_each, read_image_settings, resize, write_patches
from r4b_core.data.schema import Sample
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt

IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageSettings:
    """How images are scaled and cut.

    Attributes:
        min_pixels, max_pixels: an image is scaled so that its area lies between them.
        patch_size: side of a patch in pixels.
        merge_size: a token stands for merge_size x merge_size patches.
        frames: how often a still image is repeated in a patch. Qwen's patch embedding spans 2 frames, and the authors'
            processor writes both; the model here repeats a single one itself, which halves what is moved.
    """

    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    patch_size: int = 16
    merge_size: int = 2
    frames: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels = {self.min_pixels}, max_pixels = {self.max_pixels}: need 1 <= min <= max")
        if min(self.patch_size, self.merge_size, self.frames) < 1:
            raise ValueError(f"{self}: patch_size, merge_size and frames must be at least 1")

    @property
    def patch_dim(self) -> int:
        return 3 * self.frames * self.patch_size**2

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to: whole blocks, an area within the limits, the shape about kept.

        Raises:
            ImageError: if one side is more than 200 times the other.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(
                f"image of {height} x {width} pixels: one side is more than {MAX_ASPECT_RATIO} times the other; crop it"
            )
        block = self.patch_size * self.merge_size
        rows, columns = round(height / block), round(width / block)
        area = rows * columns * block**2
        if area > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / block) for side in (height, width))
        return rows * block, columns * block

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(time = 1, rows, columns) of patches of an image of that size."""
        height, width = self.target_size(height, width)
        return 1, height // self.patch_size, width // self.patch_size


def read_settings(folder: str | Path, frames: int = 1) -> ImageSettings:
    """The settings of a checkpoint folder's image processor (`read_image_settings`).

    Raises:
        ValueError: if they are missing or are not Qwen3-VL's.
    """
    path, found = read_image_settings(folder)
    try:
        size = found.get("size") or {}
        mean, std = (list(found.get(name, [0.5] * 3)) for name in ("image_mean", "image_std"))
        settings = ImageSettings(
            min_pixels=int(found.get("min_pixels") or size.get("shortest_edge") or ImageSettings.min_pixels),
            max_pixels=int(found.get("max_pixels") or size.get("longest_edge") or ImageSettings.max_pixels),
            patch_size=int(found.get("patch_size", ImageSettings.patch_size)),
            merge_size=int(found.get("merge_size", ImageSettings.merge_size)),
            frames=frames,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the image settings of a Qwen3-VL checkpoint ({error})") from error
    if mean != [0.5] * 3 or std != [0.5] * 3:
        raise ValueError(f"{path}: image_mean = {mean}, image_std = {std}; Qwen3-VL's are 0.5 for all three colours")
    return settings


def image_patches(
    images: Sequence[NDArray[np.uint8]], settings: ImageSettings, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """Patches of all images, float32 [P, patch_dim], block by block, and their grids, int64 [I, 3].

    Raises:
        ImageError: if an image is not uint8 [height, width, 3] or too thin.
    """
    grids = [settings.grid(*check_pixels(image)) for image in images]
    counts = [rows * columns for _, rows, columns in grids]
    patches = torch.empty(sum(counts), settings.patch_dim)
    work = [
        partial(_process, image, grid, out, settings)
        for image, grid, out in zip(images, grids, patches.split(counts), strict=True)
    ]
    for_each(work, threads)
    return patches, torch.tensor(grids, dtype=torch.int64).view(-1, 3)


def _process(image: NDArray[np.uint8], grid: tuple[int, int, int], out: Tensor, settings: ImageSettings) -> None:
    resized = resize(image, grid[1] * settings.patch_size, grid[2] * settings.patch_size)
    write_patches(resized, out, settings.patch_size, settings.merge_size, settings.frames)


def encode_messages(
    tokenizer: TextEncoder,
    messages: Sequence[Message],
    images: Sequence[NDArray[np.uint8]],
    settings: ImageSettings,
    threads: int = 1,
) -> Qwen3VLPrompt:
    """The prompt of a conversation, up to the assistant's ``<think>``; ``images`` in the order of their places.

    Raises:
        PromptError: if messages and images do not fit, or the conversation is no prompt.
        ImageError: see ``image_patches``.
    """
    rendered = render(messages, IMAGE_PLACEHOLDER)
    check_image_count(rendered.num_images, len(images))
    patches, grids = image_patches(images, settings, threads)
    block = settings.merge_size**2
    ends = grids.prod(1).cumsum(0).tolist()
    indices = [np.arange(start, end, block) for start, end in zip([0, *ends], ends, strict=False)]
    tokens, vision_index = place_images(tokenizer, rendered.text, indices)
    return Qwen3VLPrompt(tokens, vision_index, patches, grids, merge=settings.merge_size, escaped=rendered.escaped)


def encode_prompt(tokenizer: TextEncoder, sample: Sample, settings: ImageSettings) -> Qwen3VLPrompt:
    """The prompt of a sample: its images and question in the user's turn; see ``question_message`` for ``<image>``.

    Raises:
        PromptError, ImageError: see ``encode_messages``.
    """
    message = question_message(sample.question, len(sample.images))
    return encode_messages(tokenizer, [message], sample.images, settings)
