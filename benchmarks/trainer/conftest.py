"""Trainer benchmarks run on a world of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from r4b_core.config.recipe import ParallelConfig
from r4b_core.parallel.runtime import Runtime, start


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    place = start(ParallelConfig(), seed=0)
    yield place
    place.stop()
