"""Pictures: validated whole, encoded again only where training would otherwise not read them as they are shown."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from r4b_core.data.images import IMAGE_FORMATS, ImageError, open_image

OTHER_FORMATS = ("BMP", "GIF", "TIFF")
JPEG_QUALITY = 95
_ORIENTATION = 0x0112
_SIDE = 32  # of the picture that the perceptual hash sees
_LOW = 8  # frequencies of it that are kept, each way


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that can be used.

    Attributes:
        data: encoded bytes: those that came in, unless ``changed`` says why not.
        digest: of the bytes that came in, 16 bytes.
        phash: perceptual hash, 64 bits.
        changed: "", "format", "turned", "transparent" or "scaled", the last that applies.
    """

    data: bytes
    digest: bytes
    phash: int
    changed: str = ""


def check_picture(data: bytes, *, max_side: int, max_pixels: int, max_bytes: int) -> Picture:
    """Decode a picture, and encode it again where its format is not PNG, JPEG or WEBP, EXIF turns it, it has an alpha
    channel, or its longest side is over ``max_side``.

    Raises:
        ImageError: if it cannot or must not be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is odd in a file and yet can be read
        return _check(data, max_side, max_pixels, max_bytes)


def _check(data: bytes, max_side: int, max_pixels: int, max_bytes: int) -> Picture:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    changed = ""
    if other := _bring_in(data, max_pixels, max_bytes):
        data, changed = other, "format"
    pixels = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as header:
        lossy = header.format in ("JPEG", "MPO")
        if lossy and header.getexif().get(_ORIENTATION, 1) not in (0, 1):
            changed = "turned"
        if header.has_transparency_data:
            changed = "transparent"
    image = Image.fromarray(pixels)
    if max(image.size) > max_side:
        changed = "scaled"
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if changed:
        data = _encode(image, lossy)
    return Picture(data, digest, perceptual_hash(image), changed)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that hardly change with size and encoding: signs of low frequencies about their median (pHash).

    The ``phash`` of the ImageHash library, but for a box filter first, which is 4 times as fast and moves a bit or two
    of few pictures. Where a picture is flat, all but the first frequency are zero.
    """
    if (factor := min(image.size) // (3 * _SIDE)) > 1:
        image = image.reduce(factor)
    small = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    cosines = _cosines()
    low = np.round(cosines @ small @ cosines.T, 6)
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


@cache
def _cosines() -> NDArray[np.float64]:
    """The first rows of the DCT-II of ``_SIDE`` points, [_LOW, _SIDE]."""
    k, n = np.mgrid[:_LOW, :_SIDE]
    return 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))


def _bring_in(data: bytes, max_pixels: int, max_bytes: int) -> bytes | None:
    """A still picture of another common format as PNG bytes; None where the format needs no help, or gets none."""
    if len(data) > max_bytes or data[:2] not in (b"BM", b"GI", b"II", b"MM"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=OTHER_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"image: {image.width} x {image.height} pixels, more than max_pixels = {max_pixels}")
            if getattr(image, "n_frames", 1) > 1:
                raise ImageError("image: animated or of many pages: give single pictures")
            return _encode(image if image.mode in ("L", "RGB", "RGBA", "LA", "P") else image.convert("RGB"), False)
    except ImageError:
        raise
    except Exception as error:  # these decoders raise anything on damaged files
        raise ImageError(f"image: cannot be read ({type(error).__name__}: {error})") from error


def _encode(image: Image.Image, lossy: bool) -> bytes:
    file = io.BytesIO()
    if lossy:
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(file, "PNG")
    return file.getvalue()
