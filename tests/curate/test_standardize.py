"""The first stage end to end: rows in, clean unique records out, each of the others with its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_core.curate.runner import run_stage
from r4b_core.curate.standardize.run import standardize
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.store import Counts, StageError, dropped_rows, record_files
from r4b_core.data.records import Record, read_records
from tests.curate.raw import picture, published

SETTINGS = StandardizeSettings(partition_rows=5, max_foreign=0.5, max_text_chars=2000)


def run(
    folder: Path, inputs: list[Any], settings: StandardizeSettings = SETTINGS, workers: int = 0, force: bool = False
) -> Counts:
    given = [InputSettings.model_validate(one) for one in inputs]
    return standardize(
        folder, given, settings, lambda store, work, advance: run_stage(store, work, workers, advance), force=force
    )


def kept(folder: Path) -> list[Record]:
    return [record for path in record_files(folder) for record in read_records(path)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def three_inputs(tmp_path: Path) -> list[Any]:
    """A MMFineReason file, a LLaVA file and a plain one; the last repeats much of the others."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        (images / f"{i}.png").write_bytes(picture(i, (160, 120)))
    mmfr = [
        {
            "question": f"{i + 1}. How many dots lie left of line {i} in the figure? (5 points)",
            "ori_question": "...",
            "answer": str(i),
            "id": i,
            "source": "BMMR",
            "image": {"bytes": picture(i, (160, 120)), "path": None},
        }
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(mmfr), tmp_path / "mmfr.parquet", row_group_size=4)
    llava = [
        {
            "id": i,
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nHow many dots lie left of line {i} in the figure?"},
                {"from": "gpt", "value": f"So it is \\boxed{{{i}}}"},
            ],
        }
        for i in range(8, 12)
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    plain = [
        {"question": "What is two plus two?", "answer": "4"},
        {"question": "What IS two plus two", "answer": "4"},
        {"question": "What is two plus two?", "answer": "4", "image": "images/3.png"},
        {"question": "See the figure.", "answer": "4"},
        {"question": "<image>", "answer": "4", "image": "images/3.png"},
        {"question": "一共有多少个圆点在线的左边呢", "answer": "4"},
        {"question": "Prove it for all n.", "answer": "略"},
        {"question": "What is broken?", "answer": "1", "image": "broken.png"},
        {"question": "What is it?", "answer": "1", "image": ["images/1.png"] * 9},
    ]
    (tmp_path / "broken.png").write_bytes(picture(1)[:-50])
    path = write(tmp_path / "plain.jsonl", plain)
    with open(path, "ab") as file:
        file.write(b"{broken\n")
    return [str(tmp_path / "mmfr.parquet"), {"path": str(tmp_path / "llava.json"), "images": str(images)}, path]


def test_every_row_is_kept_or_told(tmp_path: Path, three_inputs: list[Any]) -> None:
    counts = run(tmp_path / "out", three_inputs)
    assert counts.kept == {"BMMR": 12, "plain": 2}
    assert counts.dropped == {
        ("llava", "duplicate"): 4,
        ("plain", "duplicate"): 1,
        ("plain", "weak question"): 1,
        ("plain", "empty question"): 1,
        ("plain", "foreign language"): 1,
        ("plain", "no checkable answer"): 1,
        ("plain", "number of images"): 1,
    }
    assert counts.quarantined == {("plain", "broken image"): 1, ("plain", "not JSON"): 1}
    assert counts.read == 12 + 4 + 10
    told = Counter((drop.source, drop.reason) for drop in dropped_rows(tmp_path / "out"))
    assert told == counts.dropped + counts.quarantined
    repeats = [drop for drop in dropped_rows(tmp_path / "out") if drop.reason == "duplicate"]
    assert {drop.detail for drop in repeats} >= {"as row 8 of mmfr.parquet", "as row 0 of plain.jsonl"}
    first = kept(tmp_path / "out")[0]
    assert first.question == "How many dots lie left of line 0 in the figure?"
    assert (first.answer, first.images) == ("0", [picture(0, (160, 120))])
    assert not (tmp_path / "out" / "clean").exists()


def test_neither_processes_nor_pieces_change_the_records(tmp_path: Path, three_inputs: list[Any]) -> None:
    run(tmp_path / "one", three_inputs)
    run(tmp_path / "two", three_inputs, workers=2)
    assert published(tmp_path / "one") == published(tmp_path / "two")
    run(tmp_path / "large", three_inputs, SETTINGS.model_copy(update={"partition_rows": 1000}))
    assert kept(tmp_path / "large") == kept(tmp_path / "one")


@pytest.mark.parametrize("done", [1, 3, 6, 7, 9])
def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, three_inputs: list[Any], done: int) -> None:
    """Killed after some partitions of either pass."""
    run(tmp_path / "whole", three_inputs)
    child = os.fork()
    if not child:
        _die_after(done, tmp_path, three_inputs)
    assert os.waitpid(child, 0)[1] == 9
    run(tmp_path / "out", three_inputs)
    assert published(tmp_path / "out") == published(tmp_path / "whole")
    assert not (tmp_path / "out" / "clean").exists()


def _die_after(partitions: int, folder: Path, inputs: list[Any]) -> None:
    from r4b_core.curate.store import PartitionWriter

    real, done = PartitionWriter.commit, 0

    def commit(writer: PartitionWriter) -> None:
        nonlocal done
        real(writer)
        done += 1
        if done == partitions:
            os.kill(os.getpid(), 9)

    try:
        PartitionWriter.commit = commit  # type: ignore[method-assign]
        run(folder / "out", inputs)
    finally:
        os._exit(0)


def test_duplicated_ids_are_quarantined_and_the_first_stays(tmp_path: Path) -> None:
    rows = [{"id": i % 7, "question": f"What is {i} plus {i}?", "answer": str(i)} for i in range(10)]
    counts = run(tmp_path / "out", [write(tmp_path / "a.jsonl", rows)])
    assert counts.quarantined == {("a", "duplicate id"): 3}
    assert [record.answer for record in kept(tmp_path / "out")] == [str(i) for i in range(7)]
    (one, *_) = [drop for drop in dropped_rows(tmp_path / "out")]
    assert (one.id, one.file, one.row, one.detail) == ("0", "a.jsonl", 7, "as row 0 of a.jsonl")


def test_benchmarks_are_kept_out(tmp_path: Path, three_inputs: list[Any]) -> None:
    bench = [
        {"question": "How many dots lie left of line 5 in the figure?", "image": "images/5.png", "answer": "5"},
        {"question": "What is two plus two?", "answer": "4"},
    ]
    path = write(tmp_path / "bench.jsonl", bench)
    asked = SETTINGS.model_copy(update={"decontaminate": SETTINGS.decontaminate.model_validate({"files": [path]})})
    counts = run(tmp_path / "out", three_inputs, asked)
    assert counts.dropped["BMMR", "benchmark text"] + counts.dropped["BMMR", "benchmark image"] == 1
    assert counts.dropped["plain", "benchmark text"] == 2
    assert all(record.id != "5" for record in kept(tmp_path / "out"))
    write(tmp_path / "bench.jsonl", [*bench, {"no": "question"}])
    with pytest.raises(StageError, match="was made with other settings: benchmarks was"):
        run(tmp_path / "out", three_inputs, asked)
    with pytest.raises(StageError, match=r"bench\.jsonl: row 2 of this benchmark: missing column"):
        run(tmp_path / "out", three_inputs, asked, force=True)


def test_a_benchmark_question_is_compared_as_it_is_cleaned(tmp_path: Path) -> None:
    bench = write(tmp_path / "bench.jsonl", [{"question": "12. What is\u200b two plus two? (5 points)", "answer": "4"}])
    data = write(tmp_path / "mine.jsonl", [{"question": "(3) What is two plus two?", "answer": "4"}])
    asked = SETTINGS.model_copy(update={"decontaminate": SETTINGS.decontaminate.model_validate({"files": [bench]})})
    assert run(tmp_path / "out", [data], asked).dropped == {("mine", "benchmark text"): 1}


def test_more_input_is_refused_until_forced(tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"What is {i} plus {i}?", "answer": str(i)} for i in range(7)]
    path = write(tmp_path / "a.jsonl", rows)
    run(tmp_path / "out", [path])
    shutil.copy(path, tmp_path / "b.jsonl")
    with pytest.raises(StageError, match="the input had 2 partitions, it now has 4"):
        run(tmp_path / "out", [path, str(tmp_path / "b.jsonl")])
    assert run(tmp_path / "out", [path, str(tmp_path / "b.jsonl")], force=True).read == 14


def test_an_empty_file_is_an_empty_stage(tmp_path: Path) -> None:
    assert run(tmp_path / "out", [write(tmp_path / "a.jsonl", [])]).read == 0
    assert record_files(tmp_path / "out") == []


SCALAR = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=True) | st.text(max_size=12)
VALUE = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "user"]), SCALAR)
NAMES = ["question", "answer", "id", "source", "image", "images", "texts", "conversations", "original_answer", "x"]
ROW = st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=6)


@given(
    st.lists(ROW | st.binary(max_size=20), max_size=12),
    st.sampled_from(["jsonl", "mmfinereason", "llava", "finevision"]),
)
@settings(max_examples=40, deadline=None)
def test_hostile_rows_never_crash_and_counts_add_up(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], form: str
) -> None:
    tmp = tmp_path_factory.mktemp("hostile")
    lines = [row.replace(b"\n", b"") if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp / "rows.jsonl").write_bytes(b"\n".join(lines))
    given = {"path": str(tmp / "rows.jsonl"), "format": form}
    counts = run(tmp / "out", [given], SETTINGS.model_copy(update={"answers": "any"}))
    assert counts.read == sum(1 for line in lines if line.strip())
    assert counts.read == counts.num_kept + counts.dropped.total() + counts.quarantined.total()
    assert len(kept(tmp / "out")) == counts.num_kept if lines and b"".join(lines).strip() else True
    assert sum(1 for _ in dropped_rows(tmp / "out")) == counts.read - counts.num_kept
