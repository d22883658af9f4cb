"""A stage's folder: complete or absent, never mixed, never more or fewer records than went in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_core.curate import store as store_module
from r4b_core.curate.stage import Drop, Outcome
from r4b_core.curate.store import (
    Counts,
    Partition,
    StageError,
    dropped_rows,
    folder_counts,
    identify,
    open_stage,
    partitions_of,
    record_files,
)
from r4b_core.data.records import Record, read_records
from tests.curate.raw import do, picture, published, record_folder, records

ASKED = {"limits": {"low": 1, "high": 2}, "rules": ["a", "b"]}


def made(tmp_path: Path, sizes: tuple[int, ...] = (25, 10, 0), asked: dict[str, Any] = ASKED, **options: Any) -> Path:
    source = tmp_path / "in"
    if not source.exists():
        record_folder(source, sizes)
    with open_stage(tmp_path / "out", "odd-out", asked, partitions_of(source), **options) as store:
        do(store)
    return tmp_path / "out"


def test_one_output_per_partition_with_its_counts_and_drops(tmp_path: Path) -> None:
    out = made(tmp_path)
    assert [path.name for path in record_files(out)] == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    first = json.loads((out / "part-00000.json").read_text())
    assert first["counts"] == {
        "in": 25,
        "kept": 10,
        "kept_by_source": {"unit": 10},
        "dropped": [{"source": "unit", "reason": "odd", "count": 12}],
        "quarantined": [{"source": "unit", "reason": "round", "count": 3}],
    }
    file = out / "part-00000.parquet"
    blake = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    assert first["output"] == {"bytes": file.stat().st_size, "digest": blake}
    total = folder_counts(out)
    assert total.read == 35 == total.num_kept + total.dropped.total() + total.quarantined.total()
    drops = list(dropped_rows(out))
    assert len(drops) == 35 - total.num_kept
    assert drops[1] == Drop("1", "unit", "odd", "1 is")
    assert [record.id for record in read_records(out / "part-00000.parquet")] == [
        str(i) for i in range(25) if i % 2 == 0 and i % 10
    ]


def test_datasets_reads_the_output_with_its_pictures(tmp_path: Path) -> None:
    record = Record("1", "s", "Which colour?", images=[picture(1)], answer="red", provenance={"file": "a"})
    parts = [Partition(0, "x", {"name": "x"})]
    with open_stage(tmp_path, "s", {}, parts) as store, store.write(parts[0]) as writer:
        writer.add(1, Outcome([record]))
    row = load_dataset("parquet", data_files=str(tmp_path / "part-00000.parquet"), cache_dir=str(tmp_path / "c"))
    assert row["train"][0]["images"][0].size == (48, 32)
    assert row["train"][0]["answer"] == "red"


def test_finished_partitions_are_not_done_again(tmp_path: Path) -> None:
    out = made(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-00001.json").unlink()
    made(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name in before if before[name] != after[name]} == {
        "part-00001.json",
        "part-00001.parquet",
        "part-00001.dropped.jsonl",
    }


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"limits": {"low": 1, "high": 3}, "rules": ["a", "b"]}, "limits.high was 2, is 3"),
        ({"limits": {"low": 1}, "rules": ["a", "b"]}, "limits.high was 2, is null"),
        ({**ASKED, "more": True}, "more was null, is true"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    before = published(made(tmp_path))
    with pytest.raises(StageError, match=f"{told}: give --force to do the stage again, or name a new folder"):
        made(tmp_path, asked=asked)
    assert published(tmp_path / "out") == before
    made(tmp_path, asked=asked, force=True)
    made(tmp_path, asked=asked)


def test_a_changed_input_is_refused_by_name(tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "in" / "input-1.parquet"
    os.utime(file, ns=(1, 1))
    with pytest.raises(StageError, match=r"the input changed: input-1\.parquet \(mtime_ns was \d+, is 1\)"):
        made(tmp_path)
    shutil.copy(file, tmp_path / "in" / "input-9.parquet")
    with pytest.raises(StageError, match="the input had 3 partitions, it now has 4"):
        made(tmp_path)
    (tmp_path / "in" / "input-9.parquet").unlink()
    file.rename(tmp_path / "in" / "input-1b.parquet")
    with pytest.raises(StageError, match=r"input-1b\.parquet stands where input-1\.parquet was"):
        made(tmp_path)


def test_our_own_output_is_known_by_its_content(tmp_path: Path) -> None:
    """A stage that is done again and gives the same bytes does not invalidate what was made of them."""
    first = made(tmp_path)
    with open_stage(tmp_path / "next", "odd-out", ASKED, partitions_of(first)) as store:
        do(store)
    made(tmp_path, force=True)
    with open_stage(tmp_path / "next", "odd-out", ASKED, partitions_of(first)) as store:
        assert store.pending() == []
    with (first / "part-00000.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StageError, match=r"part-00000\.parquet: has \d+ bytes, part-00000\.json says \d+"):
        partitions_of(first)


def test_another_stages_folder_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(StageError, match="holds the output of `odd-out`"):
        with open_stage(tmp_path / "out", "verify", ASKED, partitions_of(tmp_path / "in")):
            pass


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with open_stage(tmp_path, "s", {}, []), pytest.raises(StageError, match="another run is at work here"):
        with open_stage(tmp_path, "s", {}, []):
            pass


def test_an_unfinished_stage_is_no_input(tmp_path: Path) -> None:
    out = made(tmp_path)
    (out / "part-00002.json").unlink()
    with pytest.raises(StageError, match="2 of 3 partitions are finished: run `r4b curate odd-out` again"):
        record_files(out)
    with pytest.raises(StageError, match="holds no records"):
        record_files(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["stage.json", "part-00000.json"])
def test_a_damaged_note_is_told_with_the_way_out(tmp_path: Path, name: str) -> None:
    out = made(tmp_path)
    (out / name).write_text('{"half')
    with pytest.raises(StageError, match="is damaged .* --force"):
        made(tmp_path)
    assert made(tmp_path, force=True)


class _Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [0, 4, 300, 2000])
def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_folder(tmp_path / "in", (20, 20))
    with open_stage(tmp_path / "out", "odd-out", ASKED, partitions_of(tmp_path / "in")) as store:
        with store.write(store.partitions[0]) as writer:
            writer.add(20, Outcome(kept=records(20)))
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_create", lambda path: _Full(path.open("wb"), room))
            with pytest.raises(StageError, match="no room left for part-00001 .* free some space and run"):
                do(store)
        assert not list((tmp_path / "out").glob(".*.tmp"))
        assert {path.name.partition(".")[0] for path in (tmp_path / "out").glob("part-*")} == {"part-00000"}
        do(store)
    assert len(record_files(tmp_path / "out")) == 2


@pytest.mark.parametrize("stop", [0, 2, 3, 4, 5, 6, 7, 8, 10])
def test_killed_anywhere_a_restart_gives_the_same_files(tmp_path: Path, stop: int) -> None:
    """kill -9 before each rename and each sync of a partition."""
    record_folder(tmp_path / "in", (12,))
    with open_stage(tmp_path / "whole", "odd-out", {}, partitions_of(tmp_path / "in")) as store:
        do(store)
    killed = os.fork()
    if not killed:
        _kill_at(stop, tmp_path)
    assert os.waitpid(killed, 0)[1] == 9, "the writer ended before it was to die"
    out = tmp_path / "out"
    for sidecar in out.glob("part-*.json"):
        assert published(out)[sidecar.name] == published(tmp_path / "whole")[sidecar.name]
    with open_stage(out, "odd-out", {}, partitions_of(tmp_path / "in")) as store:
        do(store)
    assert published(out) == published(tmp_path / "whole")
    assert not list(out.glob(".*.tmp"))


def _kill_at(stop: int, folder: Path) -> None:
    """In a child: die at the n-th rename or sync."""
    calls = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > stop:
                os.kill(os.getpid(), 9)
            return real(*arguments)

        return call

    try:
        os.replace, os.fsync, Path.replace = dying(os.replace), dying(os.fsync), dying(Path.replace)  # type: ignore
        with open_stage(folder / "out", "odd-out", {}, partitions_of(folder / "in")) as store:
            do(store)
    finally:
        os._exit(0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["kept", "rule", "bad"])), max_size=60), st.data())
@settings(max_examples=40, deadline=None)
def test_counts_add_up_however_batches_are_cut(fates: list[tuple[str, str]], data: st.DataObject) -> None:
    whole, pieces, rest = Counts(), Counts(), list(fates)
    whole.add(len(fates), _outcome(fates))
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        part = Counts()
        part.add(size, _outcome(rest[:size]))
        pieces.merge(Counts.from_json(json.loads(json.dumps(part.to_json()))))
        rest = rest[size:]
    assert pieces == whole
    assert whole.read == whole.num_kept + whole.dropped.total() + whole.quarantined.total()


def _outcome(fates: list[tuple[str, str]]) -> Outcome:
    outcome = Outcome()
    for source, fate in fates:
        record = Record("1", source, "?")
        if fate == "kept":
            outcome.kept.append(record)
        else:
            outcome.drop(record, fate, quarantined=fate == "bad")
    return outcome


def test_a_stage_that_loses_a_record_is_stopped(tmp_path: Path) -> None:
    parts = [Partition(0, "x", {"name": "x"})]
    with open_stage(tmp_path, "s", {}, parts) as store:
        with pytest.raises(AssertionError, match="took 3 records, kept 2 and dropped 0: 1 are unaccounted for"):
            with store.write(parts[0]) as writer:
                writer.add(3, Outcome(kept=records(2)))
    assert not list(tmp_path.glob("part-*"))


def test_where_batches_end_leaves_no_trace(tmp_path: Path) -> None:
    record_folder(tmp_path / "in", (1400,))
    for batch in (1, 64, 1000):
        with open_stage(tmp_path / str(batch), "odd-out", {}, partitions_of(tmp_path / "in")) as store:
            do(store, batch=batch)
    assert published(tmp_path / "1") == published(tmp_path / "64") == published(tmp_path / "1000")
    kept = [int(record.id) for record in read_records(tmp_path / "64" / "part-00000.parquet")]
    assert kept == [i for i in range(1400) if i % 2 == 0 and i % 10]


def test_a_json_file_beside_foreign_data_is_no_sidecar(tmp_path: Path) -> None:
    record_folder(tmp_path, (1,))
    (tmp_path / "input-0.json").write_text("[1, 2]")
    assert set(identify(tmp_path / "input-0.parquet")) == {"name", "bytes", "mtime_ns"}
