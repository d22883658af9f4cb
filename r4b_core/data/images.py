"""Opening images that come from outside, where every file is taken to be hostile."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged files; `Warning` where the caller made warnings errors.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, Warning)


class ImageError(ValueError):
    """An image that cannot or must not be used, with the reason."""


def open_image(
    source: str | Path | bytes,
    *,
    max_pixels: int = 40_000_000,
    max_bytes: int = 32_000_000,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Decode a PNG, JPEG or WEBP file (or its bytes) into uint8 [height, width, 3].

    The content decides the format, not the name. Bytes are counted before they are read and pixels, which the header
    tells, before they are decoded. The picture is turned upright (EXIF), put on white where it is transparent, brought
    from CMYK or grey to RGB, and of 16 bits the upper 8 are kept. ``size`` (height, width) resizes by nearest
    neighbour.

    Raises:
        ImageError: if the file is missing, too large, of another format, animated, a video or damaged.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source), max_bytes)
    if len(data) > max_bytes:
        raise ImageError(f"{name}: more than max_bytes = {max_bytes} bytes")
    if kind := _video(data):
        raise ImageError(f"{name}: {kind} video; video is not supported: give single frames as images")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not a {', '.join(IMAGE_FORMATS)} image with a sound header") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more than max_pixels = {max_pixels} ({error})") from None
    except _DAMAGE as error:
        raise ImageError(f"{name}: cannot be read ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels, more than max_pixels = {max_pixels}")
    try:
        # A phone's JPEG may hold previews behind the picture (MPO): those are no animation.
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"{name}: animated, {frames} frames; video is not supported: give single frames as images")
        rgb = _to_rgb(image)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(f"{name}: cannot be read ({error})") from error
    if size is not None:
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(rgb)


def _read(path: Path, max_bytes: int) -> bytes:
    """The file's bytes, at most one more than ``max_bytes``."""
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path}: cannot be read ({error})") from error


def _video(data: bytes) -> str | None:
    """The kind of video that the first bytes tell of, or None."""
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return "an MP4 or QuickTime"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "an AVI"
    return "a Matroska or WebM" if data[:4] == b"\x1a\x45\xdf\xa3" else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decoded, upright, 8 bits, on white, RGB."""
    image.load()
    if (turn := _UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        # Pillow would clip at 255 here; of 16-bit colour it keeps the upper byte itself.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) where there is none or the EXIF block is damaged, which harms no pixel."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGE:
        return 1
