"""Images per second of the image pipelines against transformers' image processors, on the same photographs.

    r4b bench data images

The photographs are the two that scikit-learn ships, 640 x 427 pixels, and one of them at 1499 x 1001. ``pixels`` begins
with decoded pixels, ``files`` with JPEG bytes: ours opens them by `open_image`, the rival by Pillow. Both sides run on
one thread and return float32 tensors; before the clock starts these must agree to 1e-6 (one level is 8e-3). The rival
is the processor that needs no torchvision.

Qwen's patch embedding spans two frames, so its processor writes every still image twice. Our model repeats one frame
itself, so ours writes one; ``two frames`` is ours with the rival's very output.

Images per second, 2026-11-20, AMD EPYC, one thread of 2 cores shared with other jobs, Python 3.11, torch 2.13.0+cpu,
transformers 5.23.0, Pillow 13.0.0, commit e16ba14; medians of processor time, sides in turns, one run:

=========================  =============  ==================  ============
case                       ours           ours, two frames    transformers
=========================  =============  ==================  ============
Qwen3-VL 640x427 pixels    507 (2.37x)    407 (1.91x)         214
Qwen3-VL 640x427 files     322 (1.90x)    275 (1.62x)         170
Qwen3-VL 1499x1001 pixels  52 (2.34x)     29 (1.31x)          22
Qwen3-VL 1499x1001 files   41 (2.03x)     25 (1.27x)          20
R-4B 640x427 pixels        125 (2.18x)                        57
R-4B 640x427 files         98 (2.01x)                         49
R-4B 1499x1001 pixels      29 (1.75x)                         16
R-4B 1499x1001 files       28 (1.83x)                         15
=========================  =============  ==================  ============

What is left is Pillow's resampling, to whose bits both sides hold: most of our time on the larger photograph.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.turns import in_turns
from r4b_core.data.images import open_image
from r4b_core.models.qwen3_vl.processing import ImageSettings
from r4b_core.models.qwen3_vl.processing import image_patches as qwen_patches
from r4b_core.models.r4b.processing import AnyRes
from r4b_core.models.r4b.processing import image_patches as r4b_patches
from tests.models.processing_oracle import onevision_image_processor, photographs, qwen_image_processor

TURNS = 25
LIMITS = (65_536, 16_777_216)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def theirs_open(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def load(size: str) -> list[np.ndarray]:
    """Decoded JPEGs, so that both starts give the same pixels."""
    names = {"640x427": ("china", "flower"), "1499x1001": ("large",)}[size]
    return [open_image(jpeg(photographs()[name])) for name in names]


def contest(
    name: str,
    benchmark: Any,
    images: list[np.ndarray],
    start: str,
    ours: Callable[[list[np.ndarray]], Any],
    theirs: Callable[[list[np.ndarray]], Any],
    more: dict[str, Callable[[list[np.ndarray]], Any]] | None = None,
) -> None:
    files = [jpeg(image) for image in images]
    opened = {
        "ours": lambda: [open_image(data) for data in files] if start == "files" else images,
        "transformers": lambda: [theirs_open(data) for data in files] if start == "files" else images,
    }
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(opened["ours"]()),
        "transformers": lambda: theirs(opened["transformers"]()),
    }
    for other, call in (more or {}).items():
        sides[other] = lambda call=call: call(opened["ours"]())
    times = in_turns(sides, TURNS)
    benchmark.pedantic(sides["ours"], rounds=1)
    rate = {side: len(images) / seconds for side, seconds in times.seconds.items()}
    gain = {side: each / rate["transformers"] for side, each in rate.items() if side != "transformers"}
    benchmark.extra_info.update(
        ours=times.seconds["ours"],
        rivals={side: seconds for side, seconds in times.seconds.items() if side != "ours"},
        clock=times.clock,
        wall_seconds=times.wall,
        images=len(images),
        images_per_second=rate,
        gain=gain,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    shown = ", ".join(f"{side} {rate[side]:.0f} ({each:.2f}x)" for side, each in gain.items())
    print(f"\n{name}: images/s {shown}, transformers {rate['transformers']:.0f} ({times.clock})")


@pytest.mark.parametrize("start", ["pixels", "files"])
@pytest.mark.parametrize("size", ["640x427", "1499x1001"])
def test_qwen3_vl(size: str, start: str, benchmark: Any) -> None:
    images = load(size)
    processor = qwen_image_processor(*LIMITS)
    once, twice = ImageSettings(*LIMITS), ImageSettings(*LIMITS, frames=2)

    def theirs(images: list[np.ndarray]) -> torch.Tensor:
        return processor(images=images, return_tensors="pt")["pixel_values"]

    torch.testing.assert_close(qwen_patches(images, twice)[0], theirs(images), rtol=0, atol=1e-6)
    contest(
        f"Qwen3-VL {size} from {start}",
        benchmark,
        images,
        start,
        lambda images: qwen_patches(images, once)[0],
        theirs,
        {"ours, two frames": lambda images: qwen_patches(images, twice)[0]},
    )


@pytest.mark.parametrize("start", ["pixels", "files"])
@pytest.mark.parametrize("size", ["640x427", "1499x1001"])
def test_r4b(size: str, start: str, benchmark: Any) -> None:
    """One image per prompt: base view and tiles. The rival stops at tiles, ours goes on to patches.

    The rival pads all images to the same number of tiles; ours have as many as they need.
    """
    images = load(size)
    processor, settings = onevision_image_processor(), AnyRes()

    def theirs(images: list[np.ndarray]) -> torch.Tensor:
        return processor(images=[[image] for image in images], return_tensors="pt")["pixel_values"]

    def ours(images: list[np.ndarray]) -> list[torch.Tensor]:
        return [r4b_patches([image], settings)[0] for image in images]

    tiles = theirs(images).flatten(0, 1)
    cut = torch.nn.functional.unfold(tiles, 14, stride=14).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(torch.cat(ours(images)), cut, rtol=0, atol=1e-6)
    contest(f"R-4B {size} from {start}", benchmark, images, start, ours, theirs)
