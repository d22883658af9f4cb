"""Opening images: what is accepted comes out right, and everything else is refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from r4b_core.data.images import ImageError, open_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = bytes(64)) -> bytes:
    """A PNG with any header; colour 0 is grey, 2 RGB, 4 grey with alpha."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that ends after its frame header."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame


FRAMES = [Image.fromarray(noise(8, 12)), Image.new("RGB", (12, 8), "blue")]
SMOOTH = np.add.outer(np.arange(24), np.arange(36))[..., None] * np.array([3, 2, 1]) % 256


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, format: str) -> None:
    pixels = noise(16, 33)
    file = tmp_path / "image"
    Image.fromarray(pixels).save(file, format, lossless=True)
    assert (open_image(file) == pixels).all()
    assert (open_image(str(file)) == pixels).all()
    opened = open_image(file.read_bytes())
    assert (opened == pixels).all() and opened.dtype == np.uint8 and opened.flags.writeable


def test_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(Image.fromarray(SMOOTH.astype(np.uint8)), "JPEG")
    assert (open_image(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(FRAMES[0], "PNG"))
    assert (open_image(file) == noise(8, 12)).all()
    (tmp_path / "photo.png").write_bytes(encoded(FRAMES[0], "GIF"))
    with pytest.raises(ImageError, match=r"photo\.png: not a PNG, JPEG, WEBP image"):
        open_image(tmp_path / "photo.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_rotated_pictures_are_turned_upright(format: str, orientation: int) -> None:
    upright = noise(8, 12)
    # How a camera held in each of the eight ways would store this picture.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, lossless=True)
    assert (open_image(data) == upright).all()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0\x2a\0\0\0\x08\0\xff", b"Exif\0\0garbage", b"", b"Exif\0\0II\x2a\0\xff\xff\xff\xff"]
)
def test_a_damaged_exif_block_harms_no_pixel(exif: bytes) -> None:
    data = encoded(FRAMES[0], "PNG", exif=exif)
    assert (open_image(data) == noise(8, 12)).all()


def test_an_orientation_that_does_not_exist_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert (open_image(encoded(FRAMES[0], "PNG", exif=exif)) == noise(8, 12)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (16, 16), "white").convert(mode)
    opened = open_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert opened.shape == (16, 16, 3) and (opened >= 254).all()


def test_cmyk_keeps_its_colour() -> None:
    opened = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert (abs(opened.astype(int) - [255, 0, 0]) <= 2).all()


def test_transparency_is_put_on_white() -> None:
    assert (open_image(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG")) == 255).all()
    half = open_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert (half == 127).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    assert (open_image(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_of_16_bits_the_upper_8_are_kept() -> None:
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    assert (open_image(encoded(Image.fromarray(grey), "PNG")) == (grey >> 8)[..., None]).all()
    colour = png(2, 1, 16, 2, b"\0" + bytes([1, 200, 2, 100, 255, 255, 9, 9, 8, 8, 7, 7]))
    assert open_image(colour).tolist() == [[[1, 2, 255], [9, 8, 7]]]


def test_a_single_pixel_is_an_image() -> None:
    assert open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


def test_a_phones_previews_are_no_animation() -> None:
    data = encoded(Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert open_image(data).shape == (16, 16, 3)


def test_resize_only_if_asked() -> None:
    data = encoded(FRAMES[0], "PNG")
    assert open_image(data).shape == (8, 12, 3)
    assert (open_image(data, size=(16, 24))[::2, ::2] == open_image(data)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "not a PNG, JPEG, WEBP image"),
        (b"", "not a PNG, JPEG, WEBP image"),
        (encoded(FRAMES[0], "GIF"), "not a PNG, JPEG, WEBP image"),
        (encoded(FRAMES[0], "TIFF"), "not a PNG, JPEG, WEBP image"),
        (encoded(FRAMES[0], "BMP"), "not a PNG, JPEG, WEBP image"),
        (b"SIMPLE  =                    T", "not a PNG, JPEG, WEBP image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG, JPEG, WEBP image"),
        (png(0, 0), "not a PNG, JPEG, WEBP image with a sound header"),
        (png(0, 5), "not a PNG, JPEG, WEBP image with a sound header"),
        (jpeg_header(5, 0), "cannot be read|sound header"),
        (png(9000, 9000), "9000 x 9000 pixels, more than max_pixels = 40000000"),
        (png(50_000, 50_000), "more than max_pixels = 40000000 .*2500000000"),
        (jpeg_header(50_000, 50_000), "more than max_pixels = 40000000 .*2500000000"),
        (png(64, 64), "cannot be read"),
        (encoded(Image.fromarray(noise(64, 64)), "PNG")[:2000], "cannot be read"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:2000], "cannot be read .*truncated"),
        (encoded(Image.fromarray(noise(64, 64)), "WEBP")[:2000], "cannot be read|sound header"),
        (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated, 2 frames; video is not"),
        (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated, 2 frames; video is not"),
        (b"\0\0\0\x18ftypisom" + bytes(16), "MP4 or QuickTime video; video is not supported"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI video; video is not supported"),
        (b"\x1a\x45\xdf\xa3" + bytes(16), "Matroska or WebM video; video is not supported"),
    ],
)
def test_hostile_files(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(data)


def test_a_text_chunk_that_unpacks_to_more_than_it_should_is_refused() -> None:
    bomb = zlib.compress(bytes(80_000_000), 9)
    body = b"key\0\0" + bomb
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = encoded(FRAMES[0], "PNG")
    after_header = 8 + 25
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(plain[:after_header] + chunk + plain[after_header:])


def test_caps_are_settings(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encoded(Image.fromarray(noise(32, 32)), "PNG"))
    for source in (file, file.read_bytes()):
        with pytest.raises(ImageError, match="more than max_bytes = 100 bytes"):
            open_image(source, max_bytes=100)
        with pytest.raises(ImageError, match="32 x 32 pixels, more than max_pixels = 1023"):
            open_image(source, max_pixels=1023)
    assert open_image(file, max_pixels=1024, max_bytes=file.stat().st_size).shape == (32, 32, 3)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png: cannot be read"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: not a regular file"):
        open_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("null\0byte.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(format: str) -> None:
    """Flipped, cut and repeated bytes: an image or an ImageError."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(SMOOTH.astype(np.uint8)), format, exif=exif)
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        if rng.random() < 0.2:
            data = data[: len(data) // 2] + data[len(data) // 3 :]
        try:
            opened = open_image(bytes(data), max_pixels=10_000)
        except ImageError:
            outcomes[False] += 1
        else:
            assert opened.dtype == np.uint8 and opened.ndim == 3 and opened.shape[2] == 3
            outcomes[True] += 1
    assert outcomes[False] > 50
