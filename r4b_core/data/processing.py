"""Images: opening files from outside, and cutting images into patches."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from r4b_core.modes import IMAGE, THINK_CLOSE, THINK_OPEN

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_MEAN, _STD = 0.5, 0.5
_TEMPLATE_TAG = re.compile(rf"<\|\w+\|>|{THINK_OPEN}|{THINK_CLOSE}")


class ImageError(ValueError):
    """An image that cannot or must not be used, with the reason."""


class PromptError(ValueError):
    """A question that cannot be made into a prompt, with the reason."""


def open_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = 16_000_000,
    max_bytes: int = 32_000_000,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Decode a PNG, JPEG or WEBP file (or its bytes) into uint8 [height, width, 3].

    The file's bytes are counted before it is read and its pixels before it is decoded. Of an animation the first
    frame is taken; transparency is put on white. ``size`` (height, width) resizes by nearest neighbour.

    Raises:
        ImageError: if the file is missing, too large, of another format, or damaged.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    try:
        length = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if length > max_bytes:
            raise ImageError(f"{name}: {length} bytes, more than max_bytes = {max_bytes}")
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{name}: {width} x {height} pixels, more than max_pixels = {max_pixels}")
            image.load()
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not a {', '.join(IMAGE_FORMATS)} image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: cannot be read ({error})") from error
    rgb: Image.Image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if rgb.mode == "RGBA":
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    if size is not None:
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(rgb)


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
