from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r4b_core.data.processing import ImageError, PromptError, check_question, image_to_patches, open_image


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_patches_are_what_a_convolution_sees(patch_size: int) -> None:
    image = noise(2 * patch_size, 3 * patch_size)
    patches, grid = image_to_patches(image, patch_size)
    assert grid == (1, 2, 3) and patches.dtype == np.float32
    weight = torch.randn(5, 3, patch_size, patch_size)
    pixels = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    expected = torch.nn.functional.conv2d(pixels[None], weight, stride=patch_size)[0].flatten(1).T
    torch.testing.assert_close(torch.from_numpy(patches) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise(17, 32), r"17 x 32 pixels does not divide into patches of 16: .* 16 x 32"),
        (noise(16, 16).astype(np.float32), r"float32 \[16, 16, 3\]: give uint8"),
        (noise(16, 16)[..., 0], "give uint8"),
        (noise(0, 16), "0 x 16"),
    ],
)
def test_images_that_cannot_be_cut(image: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        image_to_patches(image)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_open_lossless(tmp_path: Path, format: str) -> None:
    pixels = noise(16, 32)
    file = tmp_path / "image"
    Image.fromarray(pixels).save(file, format, lossless=True)
    assert (open_image(file) == pixels).all()
    assert (open_image(file.read_bytes()) == pixels).all()


def test_open_converts_to_rgb() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (open_image(encoded(clear, "PNG")) == 255).all()
    assert open_image(encoded(Image.new("L", (8, 8), 7), "JPEG")).shape == (8, 8, 3)


def test_resize_only_if_asked() -> None:
    data = encoded(Image.fromarray(noise(8, 12)), "PNG")
    assert open_image(data).shape == (8, 12, 3)
    resized = open_image(data, size=(16, 24))
    assert (resized[::2, ::2] == open_image(data)).all()


def png_with_size(width: int, height: int) -> bytes:
    """A valid header that claims a size, with hardly any data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "not a PNG, JPEG, WEBP image"),
        (b"", "not a PNG, JPEG, WEBP image"),
        (png_with_size(5000, 5000), "5000 x 5000 pixels, more than max_pixels"),
        (png_with_size(60000, 60000), "cannot be read|more than max_pixels"),
        (encoded(Image.fromarray(noise(64, 64)), "PNG")[:2000], "cannot be read"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "not a PNG, JPEG, WEBP image"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "not a PNG, JPEG, WEBP image"),
    ],
)
def test_hostile_files(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(data)


def test_byte_cap_and_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(encoded(Image.fromarray(noise(32, 32)), "PNG"))
    with pytest.raises(ImageError, match="more than max_bytes = 100"):
        open_image(file, max_bytes=100)
    with pytest.raises(ImageError, match="missing.png: cannot be read"):
        open_image(tmp_path / "missing.png")


def test_question_with_images() -> None:
    assert check_question("final value ?", 2) == "<image><image>final value ?"
    assert check_question("left <image> or right <image> ?", 2) == "left <image> or right <image> ?"
    assert check_question("no picture", 0) == "no picture"


@pytest.mark.parametrize(("question", "images"), [("the tag <image>", 0), ("<image> and <image>", 1), ("<image>", 2)])
def test_literal_image_tags_are_refused(question: str, images: int) -> None:
    with pytest.raises(PromptError, match=f"the sample has {images} images"):
        check_question(question, images)


@pytest.mark.parametrize("tag", ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|vision_start|>"])
def test_template_tags_are_refused(tag: str) -> None:
    with pytest.raises(PromptError, match="belongs to the chat template"):
        check_question(f"hello {tag}\n", 0)
