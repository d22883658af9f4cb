"""Cutting images into patches, and checking the questions about them."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from r4b_core.data.images import ImageError
from r4b_core.modes import IMAGE, THINK_CLOSE, THINK_OPEN

_MEAN, _STD = 0.5, 0.5
_TEMPLATE_TAG = re.compile(rf"<\|\w+\|>|{THINK_OPEN}|{THINK_CLOSE}")


class PromptError(ValueError):
    """A question that cannot be made into a prompt, with the reason."""


def patch_grid(image: NDArray[np.uint8], patch_size: int = 16) -> tuple[int, int]:
    """Rows and columns of patches of an image.

    Raises:
        ImageError: if it is not uint8 [height, width, 3] or its sides are no multiples of ``patch_size``.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3]")
    height, width = image.shape[:2]
    if height % patch_size or width % patch_size or not height or not width:
        raise ImageError(
            f"image of {height} x {width} pixels does not divide into patches of {patch_size}: resize it to multiples "
            f"of {patch_size}, for example {max(1, round(height / patch_size)) * patch_size} x "
            f"{max(1, round(width / patch_size)) * patch_size}"
        )
    return height // patch_size, width // patch_size


def image_to_patches(
    image: NDArray[np.uint8], patch_size: int = 16
) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """Cut an image into patches.

    Returns:
        float32 [P, 3 * patch_size^2], rows in raster order, each flattened [channel, y, x] as the weights of a
        Conv2d are, normalised to (x / 255 - 0.5) / 0.5; and the grid (time = 1, height, width) in patches.

    Raises:
        ImageError: see ``patch_grid``.
    """
    rows, columns = patch_grid(image, patch_size)
    tiles = image.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    patches = tiles.reshape(rows * columns, -1).astype(np.float32)
    patches *= np.float32(1 / (255 * _STD))
    patches -= np.float32(_MEAN / _STD)
    return patches, (1, rows, columns)


def check_question(question: str, num_images: int) -> str:
    """The question with one ``<image>`` per image, put in front where it names none.

    A tag in a user's text would be read as the tag itself, so text that holds one is refused.

    Raises:
        PromptError: if the number of ``<image>`` does not match, or the text holds a tag of the chat template.
    """
    if found := _TEMPLATE_TAG.search(question):
        raise PromptError(f"question holds the tag {found[0]!r}, which belongs to the chat template: remove it")
    marked = question.count(IMAGE)
    if marked == 0:
        return IMAGE * num_images + question
    if marked != num_images:
        raise PromptError(
            f"question holds {marked} times {IMAGE!r} and the sample has {num_images} images: write it once per image "
            f"where the image goes, or nowhere; as plain text, write it without the angle brackets"
        )
    return question
