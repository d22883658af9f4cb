"""Opening many images: Pillow's backend against `open_image`, DALI's (where it is installed) against Pillow's.

With DALI installed its CPU backend is held to Pillow's pixels; with a GPU the other one is too, more loosely, since
its JPEG decoder is not libjpeg.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from r4b_core.data.dali import Backend, open_images
from r4b_core.data.images import ImageError, open_image
from r4b_core.data.processing import resize
from r4b_core.models.qwen3_vl.processing import ImageSettings
from tests.models.processing_oracle import photographs

BACKENDS: tuple[Backend, Backend] = ("dali", "pillow")
TARGETS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "tiles": lambda height, width: (384, 384),
    "half": lambda height, width: (max(1, height // 2), max(1, width // 2)),
    "double": lambda height, width: (2 * height, 2 * width),
    "qwen3_vl": ImageSettings(65_536, 16_777_216).target_size,
}
UPRIGHT = ["china", "flower", "strip", "thumbnail", "square", "pixel", "whole patches"]
TALL = ["portrait", "column"]


def encoded(pixels: NDArray[np.uint8], format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **{"quality": 90, **options})
    return file.getvalue()


def files(names: list[str]) -> list[bytes]:
    """Each photograph with colour at half and at full resolution, and progressive."""
    ways: list[dict[str, Any]] = [{}, {"subsampling": 0}, {"progressive": True}]
    return [encoded(photographs()[name], **options) for name in names for options in ways]


def pixels(opened: list[NDArray[np.uint8] | ImageError]) -> list[NDArray[np.uint8]]:
    images = [image for image in opened if not isinstance(image, ImageError)]
    assert len(images) == len(opened)
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)
    return images


def levels(ours: list[NDArray[np.uint8]], theirs: list[NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
    assert [image.shape for image in ours] == [image.shape for image in theirs]
    return [abs(a.astype(np.int64) - b) for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali")


def test_pillow_opens_and_resizes_as_one_by_one(tmp_path: Path) -> None:
    data = files(["thumbnail", "strip"])
    path = tmp_path / "image.png"
    path.write_bytes(encoded(photographs()["thumbnail"], "PNG"))
    sources: list[str | Path | bytes] = [*data, path, str(path)]
    for target in (None, *TARGETS.values()):
        for source, image in zip(sources, pixels(open_images(sources, target_size=target)), strict=True):
            alone = open_image(source)
            assert (image == (alone if target is None else resize(alone, *target(*alone.shape[:2])))).all()


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_what_cannot_be_used_is_named_in_its_place(tmp_path: Path, backend: Backend) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    sound = encoded(photographs()["thumbnail"])
    damaged = bytearray(encoded(photographs()["china"]))
    scan = damaged.index(b"\xff\xda")
    damaged[scan : scan + 14] = b"\xff\xda" + bytes(12)
    sources: list[str | Path | bytes] = [
        sound,
        sound[: len(sound) // 2],
        b"no image",
        tmp_path / "missing.jpg",
        encoded(photographs()["large"]),
        bytes(damaged),
        sound,
    ]
    opened = open_images(sources, backend=backend, max_pixels=1_000_000)
    reasons = ["", "truncated", "not a PNG, JPEG", "missing.jpg: cannot be read", "more than max_pixels = 1000000"]
    for image, reason in zip(opened, reasons, strict=False):
        assert (reason in str(image)) if reason else isinstance(image, np.ndarray)
    assert isinstance(opened[5], (np.ndarray, ImageError)), "a damaged scan is decoded or refused, and harms no other"
    assert isinstance(opened[6], np.ndarray) and (opened[6] == opened[0]).all()
    (thin,) = open_images([encoded(np.zeros((1, 300, 3), np.uint8))], backend=backend, target_size=TARGETS["qwen3_vl"])
    assert isinstance(thin, ImageError) and "more than 200 times the other" in str(thin)


def test_without_dali_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"image backend 'dali': .* pip install 'r4b\[dali\]', or take 'pillow'"):
        open_images([], backend="dali")
    with pytest.raises(ValueError, match="image backend 'opencv': there are pillow, dali"):
        open_images([], backend="opencv")  # type: ignore[arg-type]


def test_dali_decodes_to_the_pixels_of_pillow(dali: None) -> None:
    data = files([*UPRIGHT, *TALL, "large"])
    assert not any(difference.any() for difference in levels(*(pixels(open_images(data, backend=b)) for b in BACKENDS)))


@pytest.mark.parametrize("target", TARGETS)
def test_dali_resizes_within_two_levels_of_pillow(dali: None, target: str) -> None:
    """Inside; the outermost pixels, which the filter reaches beyond the image from, within eight."""
    for name in [*UPRIGHT, *TALL]:
        shrinks_both_ways = name in TALL and target == "half"
        found = [pixels(open_images(files([name]), backend=b, target_size=TARGETS[target])) for b in BACKENDS]
        height, width = photographs()[name].shape[:2]
        for difference in levels(*found):
            rows, columns = difference.shape[:2]
            top, side = int(3 * max(1, rows / height)) + 2, int(3 * max(1, columns / width)) + 2
            inside = difference[top:-top, side:-side]
            assert difference.max() <= 8 and difference.mean() <= (0.2 if shrinks_both_ways else 0.11), name
            if inside.size:
                assert inside.max() <= (5 if shrinks_both_ways else 2), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_dali_turns_pictures_upright(dali: None, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = [encoded(photographs()["strip"], exif=exif)]
    for target in (None, TARGETS["double"]):
        ours, theirs = (pixels(open_images(data, backend=b, target_size=target)) for b in BACKENDS)
        assert levels(ours, theirs)[0].max() <= (0 if target is None else 8)


def test_what_dali_is_not_given_is_opened_by_pillow(dali: None) -> None:
    picture = Image.fromarray(photographs()["thumbnail"])
    sources = [
        encoded(np.asarray(picture), "PNG"),
        encoded(np.asarray(picture), "WEBP"),
        encoded(np.asarray(picture.convert("L"))),
        encoded(np.asarray(picture.convert("RGBA")), "PNG"),
    ]
    with io.BytesIO() as file:
        picture.convert("CMYK").save(file, "JPEG")
        sources.append(file.getvalue())
    ours, theirs = (pixels(open_images(sources, backend=b, target_size=TARGETS["double"])) for b in BACKENDS)
    assert not any(difference.any() for difference in levels(ours, theirs))


def test_more_images_than_a_batch_come_out_in_order(dali: None) -> None:
    data = files(["thumbnail", "pixel"]) * 12
    ours, theirs = (pixels(open_images(data, backend=b)) for b in BACKENDS)
    assert len(data) > 64 and not any(difference.any() for difference in levels(ours, theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
def test_dali_on_a_gpu_is_near_pillow(dali: None, target: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data = files(UPRIGHT)
    ours = pixels(open_images(data, backend="dali", target_size=TARGETS[target], device_id=0))
    theirs = pixels(open_images(data, target_size=TARGETS[target]))
    for difference in levels(ours, theirs):
        assert difference.mean() <= 1.5
