"""Stages on a local Ray: the same bytes as here, finished partitions skipped, one error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from r4b_core.curate.ray_runner import connect, run_stage_on_ray
from r4b_core.curate.runner import RecordWork
from r4b_core.curate.store import StageError, open_stage, partitions_of
from tests.curate.raw import do, odd_out_work, open_dies, published, record_folder

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_the_bytes_are_those_of_the_local_runner(tmp_path: Path) -> None:
    source = partitions_of(record_folder(tmp_path / "in", (30, 5, 0, 12)))
    with open_stage(tmp_path / "here", "odd-out", {}, source) as store:
        do(store)
    told: list[int] = []
    with open_stage(tmp_path / "there", "odd-out", {}, source) as store:
        do_first = store.pending()[1]
        with store.write(do_first) as writer:
            work = odd_out_work()
            with work.open() as process:
                list(process(do_first, writer))
        before = (tmp_path / "there" / "part-00001.parquet").stat().st_mtime_ns
        run_stage_on_ray(store, odd_out_work(), "local", told.append)
        assert (tmp_path / "there" / "part-00001.parquet").stat().st_mtime_ns == before
    assert published(tmp_path / "here") == published(tmp_path / "there")
    assert sum(told) == 42


def test_errors_are_told_once(tmp_path: Path) -> None:
    source = partitions_of(record_folder(tmp_path / "in", (3, 3)))
    (tmp_path / "in" / "input-1.parquet").write_bytes(b"PAR1")
    with open_stage(tmp_path / "cut", "s", {}, source) as store:
        with pytest.raises(StageError, match=r"input-1\.parquet: not a readable Parquet file"):
            run_stage_on_ray(store, odd_out_work(), "local")
    source = partitions_of(record_folder(tmp_path / "again", (3, 3)))
    with open_stage(tmp_path / "dies", "s", {}, source) as store:
        once = RecordWork(open_dies, ("4", str(tmp_path / "once"), False))
        run_stage_on_ray(store, once, "local")
        assert (tmp_path / "once").exists() and store.counts().num_kept == 6
    with open_stage(tmp_path / "dies-again", "s", {}, source) as store:
        always = RecordWork(open_dies, ("4", str(tmp_path / "always"), True))
        with pytest.raises(StageError, match="the process of part-00001 .* died twice"):
            run_stage_on_ray(store, always, "local")


@pytest.mark.parametrize(
    ("address", "told"),
    [("127.0.0.1:1", "no Ray cluster answers there"), ("nowhere", "an address is local, auto, HOST:PORT")],
)
def test_no_cluster_is_one_error(address: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(StageError, match=f"--ray {address}: {told}"):
        connect(address)
