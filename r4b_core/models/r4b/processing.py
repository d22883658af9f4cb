"""R-4B's inputs: AnyRes tiles to patches, and chat messages to tokens, equal to LLaVA-OneVision's in transformers.

An image alone in its prompt is seen twice: whole, squeezed into one tile (the base view), and in detail, as a grid of
tiles. Of several images only the base views are seen. A tile is one image of the ViT. What R-4B's own
configuration says about the sizes of the grid is not public; LLaVA-OneVision's stand here, and they are a setting.

Shapes: side = tile_size // patch_size patches along a tile, P patches, I tiles.
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

from r4b_core.data.batch import PackedBatch
from r4b_core.data.chat import (
    Message,
    TextEncoder,
    check_image_count,
    place_images,
    question_message,
    render,
)
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.processing import check_pixels, for_each, read_image_settings, resize, write_patches
from r4b_core.data.schema import Sample
from r4b_core.modes import IMAGE, NEWLINE

Size = tuple[int, int]
_ONEVISION_SIZES = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
_PADDING_LEVEL = 127  # int(mean * 255): what the sides of a squared image are filled with


@dataclass(frozen=True)
class AnyRes:
    """How images are scaled and tiled.

    Attributes:
        tile_size: side of a tile in pixels; pixels beyond the last whole patch are not seen.
        patch_size: side of a patch in pixels.
        sizes: (height, width) in pixels of the tile grids to choose from, multiples of ``tile_size``.
    """

    tile_size: int = 384
    patch_size: int = 14
    sizes: tuple[Size, ...] = _ONEVISION_SIZES

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= self.tile_size:
            raise ValueError(f"patch_size = {self.patch_size}, tile_size = {self.tile_size}: need 1 <= patch <= tile")
        odd = [size for size in self.sizes if min(size) < 1 or size[0] % self.tile_size or size[1] % self.tile_size]
        if odd or not self.sizes:
            raise ValueError(f"sizes: {odd or 'none'}; give multiples of tile_size = {self.tile_size}, at least one")

    @property
    def side(self) -> int:
        """Patches along a tile."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.side**2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    def best_size(self, height: int, width: int) -> Size:
        """The size that keeps most of the image's pixels and, of those, has the least area to spare."""

        def kept(size: Size) -> int:
            scale = min(size[1] / width, size[0] / height)
            return min(int(width * scale) * int(height * scale), width * height)

        # Of equals the first one counts.
        return max(self.sizes, key=lambda size: (kept(size), -(size[0] * size[1] - kept(size))))


def read_settings(folder: str | Path, patch_size: int = 14) -> AnyRes:
    """The settings of a checkpoint folder's image processor; the patch size is the vision tower's.

    Raises:
        ValueError: if they are missing or do not say how to tile.
    """
    path, found = read_image_settings(folder)
    try:
        height, width = found["size"]["height"], found["size"]["width"]
        sizes = tuple((int(rows), int(columns)) for rows, columns in found["image_grid_pinpoints"])
        mean, std = list(found["image_mean"]), list(found["image_std"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the image settings of an R-4B checkpoint ({error!r})") from error
    if height != width or mean != [0.5] * 3 or std != [0.5] * 3:
        raise ValueError(
            f"{path}: size = {height} x {width}, image_mean = {mean}, image_std = {std}; R-4B's tiles are square and "
            "its mean and std 0.5 for all three colours"
        )
    return AnyRes(height, patch_size, sizes)


@dataclass(frozen=True)
class Tiling:
    """The detailed view of one image: a grid of tiles, and what of it the image covers.

    Attributes:
        size: (height, width) of the grid in pixels.
        scaled: (height, width) of the image within, in its middle.
        unpadded: (top, bottom, left, right) of the patches that are kept, counted in the whole grid.
    """

    size: Size
    scaled: Size
    unpadded: tuple[int, int, int, int]

    def index(self, settings: AnyRes) -> NDArray[np.int64]:
        """int64 [n]: the patch that each image token stands for, the base view's first (0 ...), and -2 per row."""
        side, per_tile = settings.side, settings.patches_per_tile
        top, bottom, left, right = self.unpadded
        rows, columns = np.arange(top, bottom)[:, None], np.arange(left, right)
        tile = rows // side * (self.size[1] // settings.tile_size) + columns // side
        patch = (1 + tile) * per_tile + rows % side * side + columns % side
        lines = np.pad(patch, ((0, 0), (0, 1)), constant_values=PackedBatch.NEWLINE_INDEX)
        return np.concatenate([np.arange(per_tile), lines.ravel()])


def tiling(height: int, width: int, settings: AnyRes) -> Tiling:
    """The grid for an image of that size. Of a very thin image the unpadded part may be empty."""
    size = settings.best_size(height, width)
    by_height, by_width = size[0] / height, size[1] / width
    if by_width < by_height:
        scaled = min(math.ceil(height * by_width), size[0]), size[1]
    else:
        scaled = size[0], min(math.ceil(width * by_height), size[1])

    # The padding is found once more in patches, with another rounding than in pixels, as the authors' code does.
    rows, columns = (length // settings.tile_size * settings.side for length in size)
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    return Tiling(size, scaled, (top, rows - top, left, columns - left))


def image_patches(
    images: Sequence[NDArray[np.uint8]], settings: AnyRes, threads: int = 1
) -> tuple[Tensor, Tensor, list[NDArray[np.int64]]]:
    """The images of one prompt as the ViT takes them.

    Returns:
        patches, float32 [P, patch_dim], tile by tile in raster order; the tiles' grids, int64 [I, 3]; and for each
        image the patch that each of its tokens stands for (-2: row separator).

    Raises:
        ImageError: if an image is not uint8 [height, width, 3].
    """
    sizes = [check_pixels(image) for image in images]
    per_tile = settings.patches_per_tile
    if len(images) == 1:
        ((image, size),) = zip(images, sizes, strict=True)
        plan = tiling(*size, settings)
        rows, columns = (length // settings.tile_size for length in plan.size)
        patches = torch.empty((1 + rows * columns) * per_tile, settings.patch_dim)
        base, *tiles = patches.split(per_tile)
        work = [
            partial(_write_base, image, base, settings),
            partial(_write_tiles, image, tiles, plan, settings),
        ]
        indices = [plan.index(settings)]
    else:
        patches = torch.empty(len(images) * per_tile, settings.patch_dim)
        views = patches.split(per_tile) if images else ()
        work = [partial(_write_squared, image, out, settings) for image, out in zip(images, views, strict=True)]
        starts = range(0, len(patches), per_tile)
        indices = [np.append(np.arange(start, start + per_tile), PackedBatch.NEWLINE_INDEX) for start in starts]
    for_each(work, threads)
    grid = torch.tensor([1, settings.side, settings.side]).expand(len(patches) // per_tile, 3).contiguous()
    return patches, grid, indices


def _write_base(image: NDArray[np.uint8], out: Tensor, settings: AnyRes) -> None:
    """The whole image, squeezed into a tile."""
    seen = settings.side * settings.patch_size
    tile = resize(image, settings.tile_size, settings.tile_size)
    write_patches(tile[:seen, :seen], out, settings.patch_size)


def _write_squared(image: NDArray[np.uint8], out: Tensor, settings: AnyRes) -> None:
    """The whole image as a tile, made square by grey sides."""
    height, width = image.shape[:2]
    longer = max(height, width)
    square = np.full((longer, longer, 3), _PADDING_LEVEL, np.uint8)
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = image
    _write_base(square, out, settings)


def _write_tiles(image: NDArray[np.uint8], outs: Sequence[Tensor], plan: Tiling, settings: AnyRes) -> None:
    """The detailed view: the image in the middle of a black canvas, tile by tile."""
    canvas = np.zeros((*plan.size, 3), np.uint8)
    height, width = plan.scaled
    top, left = (plan.size[0] - height) // 2, (plan.size[1] - width) // 2
    canvas[top : top + height, left : left + width] = resize(image, height, width)
    seen = settings.side * settings.patch_size
    corners = [
        (y, x) for y in range(0, plan.size[0], settings.tile_size) for x in range(0, plan.size[1], settings.tile_size)
    ]
    for (y, x), out in zip(corners, outs, strict=True):
        write_patches(canvas[y : y + seen, x : x + seen], out, settings.patch_size)


def encode_messages(
    tokenizer: TextEncoder,
    messages: Sequence[Message],
    images: Sequence[NDArray[np.uint8]],
    settings: AnyRes,
    threads: int = 1,
) -> EncodedPrompt:
    """The prompt of a conversation, up to the assistant's ``<think>``; ``images`` in the order of their places.

    Raises:
        PromptError: if messages and images do not fit, or the conversation is no prompt.
        ImageError: see ``image_patches``.
    """
    rendered = render(messages, IMAGE)
    check_image_count(rendered.num_images, len(images))
    patches, grid, indices = image_patches(images, settings, threads)
    tokens, vision_index = place_images(tokenizer, rendered.text, indices)
    return EncodedPrompt(tokens, vision_index, patches, grid, escaped=rendered.escaped)


def encode_prompt(tokenizer: TextEncoder, sample: Sample, settings: AnyRes) -> EncodedPrompt:
    """The prompt of a sample: its images and question in the user's turn; see ``question_message`` for ``<image>``.

    Images that the question does not place stand in front, a newline after each, as in LLaVA's conversations.

    Raises:
        PromptError, ImageError: see ``encode_messages``.
    """
    message = question_message(sample.question, len(sample.images), after_image=NEWLINE)
    return encode_messages(tokenizer, [message], sample.images, settings)
