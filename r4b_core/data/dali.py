"""Many images at a time: by Pillow, or by NVIDIA DALI, which decodes JPEG and resizes on a GPU.

How far from Pillow, on DALI's CPU backend (2.4.0, photographs; ``tests/data/test_dali.py``): decoded, not at all.
Resized, 2 levels at most inside an image and 8 in its outermost pixels, where Pillow drops the filter's taps that lie
outside and DALI repeats the border; on average 0.03. Pillow filters along one axis, rounds and clips to 8 bits, then
along the other, and so this does; in one step DALI would keep fractions (12 levels, 0.15 on average). Where both axes
shrink Pillow 13 decides itself which is first; for tall images this differs: 5 levels, 0.2 on average. On a GPU, whose
decoder is another one, nothing was measured.

DALI is given three-channel JPEG files alone. All others, and files whose header or end is not sound, go to
`open_image`, which says what is wrong with them.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from r4b_core.data.images import ImageError, open_image
from r4b_core.data.processing import resize

Backend = Literal["pillow", "dali"]
Size = tuple[int, int]
TargetSize = Callable[[int, int], Size]

# Most images in one run of the pipeline: what bounds its memory.
BATCH = 32
_SIDEWAYS = (5, 6, 7, 8)
_EXIF_ORIENTATION = 0x0112
_END_OF_JPEG = b"\xff\xd9"


def open_images(
    sources: Sequence[str | Path | bytes],
    *,
    backend: Backend = "pillow",
    target_size: TargetSize | None = None,
    max_pixels: int = 40_000_000,
    max_bytes: int = 32_000_000,
    threads: int = 1,
    device_id: int | None = None,
) -> list[NDArray[np.uint8] | ImageError]:
    """Decode images as `open_image` does and resize them, bicubic with antialiasing; all as uint8 [height, width, 3].

    Args:
        sources: paths or files' bytes.
        target_size: (height, width) of the upright image -> (height, width) to resize it to; None leaves it as it is.
        max_pixels, max_bytes: see `open_image`.
        threads: of DALI's on the host.
        device_id: the GPU that DALI decodes and resizes on; None is the CPU.

    Returns:
        The images, and an ImageError with the reason in place of each that cannot be used.

    Raises:
        ValueError: an unknown backend, or DALI is asked for and not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"image backend {backend!r}: there are {', '.join(get_args(Backend))}")
    if backend == "dali":
        _dali()
    files: dict[int, bytes] = {}
    sizes: dict[int, tuple[Size, Size]] = {}
    opened: dict[int, NDArray[np.uint8] | ImageError] = {}
    for number, source in enumerate(sources):
        data = _jpeg(source, max_bytes) if backend == "dali" else None
        size = _upright_size(data, max_pixels) if data else None
        if data is None or size is None:
            opened[number] = _open_by_pillow(source, target_size, max_pixels, max_bytes)
            continue
        try:
            sizes[number] = size, size if target_size is None else target_size(*size)
        except ImageError as error:
            opened[number] = error
            continue
        files[number] = data
    numbers = list(files)
    for start in range(0, len(numbers), BATCH):
        chosen = numbers[start : start + BATCH]
        images: Sequence[NDArray[np.uint8] | ImageError]
        try:
            images = _decode([files[n] for n in chosen], [sizes[n] for n in chosen], threads, device_id)
        except RuntimeError:
            # DALI refuses a batch as a whole: one by one, damaged images get a reason and the others their pixels.
            images = [_open_by_pillow(sources[n], target_size, max_pixels, max_bytes) for n in chosen]
        opened.update(zip(chosen, images, strict=True))
    return [opened[number] for number in range(len(sources))]


def _open_by_pillow(
    source: str | Path | bytes, target_size: TargetSize | None, max_pixels: int, max_bytes: int
) -> NDArray[np.uint8] | ImageError:
    try:
        image = open_image(source, max_pixels=max_pixels, max_bytes=max_bytes)
        return image if target_size is None else resize(image, *target_size(*image.shape[:2]))
    except ImageError as error:
        return error


def _jpeg(source: str | Path | bytes, max_bytes: int) -> bytes | None:
    """The bytes of a file that begins and ends as a JPEG does and is not too large, else None."""
    if isinstance(source, bytes):
        data = source
    else:
        path = Path(source)
        try:
            if not path.is_file():
                return None
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        except (OSError, ValueError):
            return None
    sound = data[:3] == b"\xff\xd8\xff" and _END_OF_JPEG in data[-64:] and len(data) <= max_bytes
    return data if sound else None


def _upright_size(data: bytes, max_pixels: int) -> Size | None:
    """(height, width) once turned upright, from the header of a three-channel JPEG not too large; else None."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        turn = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # whatever is wrong with it, `open_image` names it
        return None
    width, height = image.size
    if image.format != "JPEG" or image.mode != "RGB" or width * height > max_pixels:
        return None
    return (width, height) if turn in _SIDEWAYS else (height, width)


def _dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise ValueError(
            f"image backend 'dali': nvidia.dali cannot be imported ({error}); pip install 'r4b[dali]', or take 'pillow'"
        ) from error


def _decode(
    files: list[bytes], sizes: list[tuple[Size, Size]], threads: int, device_id: int | None
) -> list[NDArray[np.uint8]]:
    """Images from (upright size, size to resize to)."""
    pipeline = _pipeline(threads, device_id)
    pipeline.feed_input("files", [np.frombuffer(data, np.uint8) for data in files])
    pipeline.feed_input("first", [np.array(_first_step(old, new), np.float32) for old, new in sizes])
    pipeline.feed_input("second", [np.array(new, np.float32) for _, new in sizes])
    try:
        (images,) = pipeline.run()
    except RuntimeError:
        # A pipeline that has raised holds what it was fed.
        _pipeline.cache_clear()
        raise
    images = images if device_id is None else images.as_cpu()
    return [np.array(images.at(number)) for number in range(len(files))]


def _first_step(old: Size, new: Size) -> Size:
    """The size between: Pillow 13 begins with the height where that alone shrinks, else mostly with the width."""
    return (new[0], old[1]) if new[0] < old[0] and new[1] >= old[1] else (old[0], new[1])


@lru_cache(maxsize=4)
def _pipeline(threads: int, device_id: int | None) -> Any:
    """Files -> upright RGB at the sizes given: decoded by nvJPEG or libjpeg, then resized."""
    dali = _dali()
    fn = importlib.import_module("nvidia.dali.fn")
    made = dali.Pipeline(batch_size=BATCH, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with made:
        files = fn.external_source(name="files")
        pixels = fn.decoders.image(
            files,
            device="cpu" if device_id is None else "mixed",
            output_type=dali.types.RGB,
            # As libjpeg-turbo upsamples colour, hence Pillow.
            jpeg_fancy_upsampling=True,
        )
        for size in ("first", "second"):
            pixels = fn.resize(
                pixels, size=fn.external_source(name=size), interp_type=dali.types.INTERP_CUBIC, antialias=True
            )
        made.set_outputs(pixels)
    made.build()
    return made
