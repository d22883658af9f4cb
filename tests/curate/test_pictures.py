"""Pictures: kept byte for byte unless they must be encoded again, and refused where they are not whole."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from r4b_core.curate.standardize.pictures import Picture, check_picture, perceptual_hash
from r4b_core.data.images import ImageError
from tests.curate.raw import picture


def check(data: bytes, max_side: int = 2048) -> Picture:
    return check_picture(data, max_side=max_side, max_pixels=10**6, max_bytes=10**6)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_what_training_can_read_keeps_its_bytes(form: str) -> None:
    data = picture(1, form=form)
    assert (check(data).data, check(data).changed) == (data, "")


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF"])
def test_other_formats_become_png(form: str) -> None:
    made = check(picture(1, form=form))
    assert (made.changed, opened(made.data).format, opened(made.data).size) == ("format", "PNG", (48, 32))
    assert (made.phash ^ check(picture(1)).phash).bit_count() <= 4


def test_a_large_picture_is_scaled_to_the_longest_side_allowed() -> None:
    lossless, lossy = check(picture(1, (400, 100)), 100), check(picture(1, (100, 400), "JPEG"), 100)
    assert (opened(lossless.data).size, opened(lossless.data).format) == ((100, 25), "PNG")
    assert (opened(lossy.data).size, opened(lossy.data).format) == ((25, 100), "JPEG")
    assert lossless.changed == lossy.changed == "scaled"


def test_a_picture_that_exif_turns_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    made = check(picture(1, form="JPEG", exif=exif))
    assert (made.changed, opened(made.data).size) == ("turned", (32, 48))
    assert opened(made.data).getexif().get(0x0112, 1) == 1


def test_a_transparent_picture_is_put_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    made = check(file.getvalue())
    assert made.changed == "transparent"
    assert opened(made.data).mode == "RGB" and opened(made.data).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", picture(1)[:-100], picture(1, (2000, 1000)), b"BM" + b"\0" * 60, b"GIF89a" + b"\0" * 20]
    + [b"II*\0" + b"\xff" * 50, b"<svg/>", picture(1, form="GIF")[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 50],
)
def test_what_is_not_whole_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        check(data)


def test_the_hash_stands_through_size_and_encoding_and_tells_pictures_apart() -> None:
    hashes = [check(picture(seed, (160, 120))).phash for seed in range(20)]
    for seed, same in enumerate(hashes):
        for changed in (picture(seed, (160, 120), "JPEG", quality=60), picture(seed, (320, 240), "JPEG")):
            assert (check(changed).phash ^ same).bit_count() <= 4
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_the_hash_is_that_of_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash")
    moved = []
    for seed in range(20):
        small, large = opened(picture(seed, (90, 70))), opened(picture(seed, (640, 427), "JPEG"))
        theirs = [np.packbits(imagehash.phash(image).hash).tobytes() for image in (small, large)]
        assert perceptual_hash(small) == int.from_bytes(theirs[0], "big")
        moved.append((perceptual_hash(large) ^ int.from_bytes(theirs[1], "big")).bit_count())
    assert max(moved) <= 6 and sum(moved) <= 2 * len(moved)


def test_a_flat_picture_has_a_hash_that_says_nothing() -> None:
    assert perceptual_hash(Image.new("RGB", (50, 50), "grey")).bit_count() <= 1
