"""Cutting images into patches, and checking the questions about them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from r4b_core.data.images import ImageError
from r4b_core.modes import IMAGE, THINK_CLOSE, THINK_OPEN

# (x / 255 - mean) / std with mean = std = 0.5
_SCALE, _SHIFT = 2 / 255, 1.0
_TEMPLATE_TAG = re.compile(rf"<\|\w+\|>|{THINK_OPEN}|{THINK_CLOSE}")


class PromptError(ValueError):
    """A question that cannot be made into a prompt, with the reason."""


def read_image_settings(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings in a checkpoint folder, and the file that holds them.

    That is ``preprocessor_config.json``, or what transformers 5 writes in its place: ``processor_config.json``, where
    they are the part ``image_processor``.

    Raises:
        ValueError: if both files are missing, or the one that counts is not readable or holds no such settings.
    """
    own, joint = (Path(folder) / name for name in ("preprocessor_config.json", "processor_config.json"))
    path = joint if joint.is_file() and not own.is_file() else own
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["image_processor"] if path is joint else found
        if not isinstance(settings, dict):
            raise TypeError(f"{type(settings).__name__} instead of settings")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no readable image settings ({error!r})") from error
    return path, settings


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
    patches = torch.empty(rows * columns, 3 * patch_size**2)
    write_patches(image, patches, patch_size)
    return patches.numpy(), (1, rows, columns)


def write_patches(image: NDArray[np.uint8], out: Tensor, patch_size: int, merge: int = 1, frames: int = 1) -> None:
    """Cut an image whose sides are multiples of ``patch_size * merge`` into the rows of ``out``, normalised.

    Args:
        image: uint8 [height, width, 3].
        out: float32 [P, 3 * frames * patch_size^2], each row flattened [channel, frame, y, x].
        merge: rows go block by block of merge x merge patches, in raster order of blocks and within each.
        frames: how often a still image is repeated for a patch embedding that takes several frames.
    """
    rows, columns = image.shape[0] // (patch_size * merge), image.shape[1] // (patch_size * merge)
    tiles = image.reshape(rows, merge, patch_size, columns, merge, patch_size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    pixels = torch.from_numpy(tiles.reshape(len(out), 3, 1, patch_size**2))
    out = out.view(len(out), 3, frames, patch_size**2)
    first = out[:, :, :1]
    first.copy_(pixels).mul_(_SCALE).sub_(_SHIFT)
    if frames > 1:
        out[:, :, 1:] = first


def resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic with antialiasing, uint8 [height, width, 3], to the bit as Pillow does it."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def check_pixels(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of an image.

    Raises:
        ImageError: if it is not uint8 [height, width, 3] or holds no pixel.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ImageError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3] with pixels in it")
    return image.shape[0], image.shape[1]


def for_each(work: Sequence[Callable[[], None]], threads: int) -> None:
    """Do all work, on ``threads`` threads where that is more than one."""
    if threads == 1 or len(work) < 2:
        for task in work:
            task()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(task) for task in work]:
            done.result()


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
