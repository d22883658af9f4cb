"""Partitions over processes: the same bytes, deaths survived once, errors told once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from r4b_core.curate.runner import RecordWork, run_stage
from r4b_core.curate.store import StageError, StageStore, open_stage, partitions_of
from tests.curate.raw import do, odd_out_work, open_dies, open_fails, published, record_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StageStore]:
    record_folder(tmp_path / "in", (12, 8, 20))
    with open_stage(tmp_path / "out", "odd-out", {}, partitions_of(tmp_path / "in")) as opened:
        yield opened


def test_processes_write_what_one_writes_and_count_the_same(tmp_path: Path, store: StageStore) -> None:
    told: list[int] = []
    run_stage(store, odd_out_work(), 2, told.append)
    assert sum(told) == 40
    with open_stage(tmp_path / "alone", "odd-out", {}, partitions_of(tmp_path / "in")) as alone:
        do(alone)
    assert published(tmp_path / "alone") == published(tmp_path / "out")


def test_a_worker_that_dies_costs_its_partition_a_second_try(tmp_path: Path, store: StageStore) -> None:
    work = RecordWork(open_dies, ("15", str(tmp_path / "marker"), False))
    run_stage(store, work, 2)
    assert (tmp_path / "marker").exists()
    assert store.counts().num_kept == 40


def test_a_worker_that_dies_twice_ends_the_stage(tmp_path: Path, store: StageStore) -> None:
    work = RecordWork(open_dies, ("15", str(tmp_path / "marker"), True))
    told = "the worker of part-00001 .*input-1.parquet.* died 2 times .*SIGKILL, as when memory runs out"
    with pytest.raises(StageError, match=told):
        run_stage(store, work, 1)
    assert [partition.index for partition in store.pending()] == [1, 2]


def test_damaged_input_is_one_error(tmp_path: Path, store: StageStore) -> None:
    file = tmp_path / "in" / "input-1.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    for workers in (0, 1):
        with pytest.raises(StageError, match=f"{re.escape(str(file))}: not a readable Parquet file"):
            run_stage(store, odd_out_work(), workers)


def test_our_own_mistake_keeps_its_traceback(store: StageStore) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a worker of odd-out failed.*in __call__.*a mistake of ours"):
        run_stage(store, RecordWork(open_fails, None), 1)


def test_workers_of_standardize_import_no_torch() -> None:
    """It would cost each of them 190 MB and seconds."""
    program = "import sys, r4b_core.curate.standardize.run; sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": paths})
