"""What the tests of whole runs share: the fork server, a recipe of a second, and one undisturbed run of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from r4b_core.config.recipe import ParallelConfig
from r4b_core.parallel import runtime
from r4b_core.parallel.runtime import Runtime
from tests.stages.fork_server import ForkServer
from tests.stages.runs import SMALL
from tests.stages.trials import Lab


@pytest.fixture(scope="module")
def ranks() -> Iterator[Runtime]:
    """A world of one."""
    started = runtime.start(ParallelConfig(), seed=0)
    gc.collect()
    gc.freeze()  # every stage collects garbage, and what pytest has loaded is none
    yield started
    gc.unfreeze()
    started.stop()


@pytest.fixture
def lab(ranks: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(ranks, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    made = ForkServer()
    yield made
    made.close()


@pytest.fixture(scope="session")
def straight(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the small recipe, trained without a disturbance."""
    run = tmp_path_factory.mktemp("straight") / "run"
    ended = server.run("train", *SMALL, "--run", run)
    assert ended.status == 0, ended.output
    return run


@pytest.fixture(scope="session")
def halfway(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in BPO's fourth step; the newest checkpoint is of its third. Copy before use."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    ended = server.run("train", *SMALL, "--run", run, events=[{"at": "r4b_core.stages.bpo:pack", "nth": 4}])
    assert ended.status == -9, ended.output
    return run
