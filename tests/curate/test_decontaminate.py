"""What benchmarks hold stays out: long questions by a run of words, short ones whole, pictures by sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from r4b_core.curate.standardize.decontaminate import IMAGE, TEXT, Benchmarks
from r4b_core.curate.standardize.pictures import Picture, check_picture
from r4b_core.curate.standardize.settings import DecontaminateSettings
from r4b_core.curate.standardize.text import words
from tests.curate.raw import picture

SETTINGS = DecontaminateSettings(ngram=8)
LONG = "A train leaves the station at noon and travels north at sixty miles per hour until it stops"


def seen(data: bytes) -> Picture:
    return check_picture(data, max_side=2048, max_pixels=10**6, max_bytes=10**6)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Benchmarks:
    made = Benchmarks.build(
        [
            (words(LONG), []),
            (words("Find x."), [seen(picture(1, (160, 120)))]),
            (words("Name the capital of France."), []),
            ([], [seen(picture(9, (8, 8)))]),
        ],
        SETTINGS,
    )
    path = tmp_path_factory.mktemp("index") / "benchmarks.npz"
    made.save(path)
    return Benchmarks.load(path)


@pytest.mark.parametrize(
    ("question", "data", "reason"),
    [
        (LONG, None, TEXT),
        ("Read this. A TRAIN leaves the station, at noon, and travels west", None, TEXT),  # eight words of it
        ("A train leaves the station at noon. Where to, and why?", None, None),  # seven words
        ("Find x.", picture(1, (160, 120)), TEXT),
        ("Find x.", picture(2, (160, 120)), None),
        ("Find x.", None, None),
        ("name the capital of france", None, TEXT),
        ("Name the capital of France.", picture(2), None),
        ("Something else?", picture(1, (160, 120)), IMAGE),
        ("Something else?", picture(1, (320, 240), "JPEG"), IMAGE),
        ("Something else?", picture(3, (160, 120)), None),
        ("", None, None),
    ],
)
def test_what_is_found(benchmarks: Benchmarks, question: str, data: bytes | None, reason: str | None) -> None:
    pictures = [seen(data)] if data else []
    assert benchmarks.find(words(question), pictures, SETTINGS) == reason


def test_pictures_can_be_left_out_of_account(benchmarks: Benchmarks) -> None:
    settings = SETTINGS.model_copy(update={"images": False})
    assert benchmarks.find(words("Something else?"), [seen(picture(1, (160, 120)))], settings) is None


def test_flat_pictures_are_told_by_their_bytes_alone() -> None:
    import io

    from PIL import Image

    def flat(colour: str) -> Picture:
        file = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(file, "PNG")
        return seen(file.getvalue())

    index = Benchmarks.build([([], [flat("white")])], SETTINGS)
    assert index.find(["a"], [flat("white")], SETTINGS) == IMAGE
    assert index.find(["a"], [flat("grey")], SETTINGS) is None


def test_nothing_is_in_no_benchmark(tmp_path: Path) -> None:
    assert Benchmarks.build([], SETTINGS).find(words(LONG), [seen(picture(1))], SETTINGS) is None
