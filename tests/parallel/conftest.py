"""A world of one for each test of this folder that asks for it, taken down afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import Runtime, start
from tests.parallel.harness import Layout, Optim, fill_by_name
from tests.parallel.toy import build_toy


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    place = start(getattr(request, "param", Layout()), seed=1)
    yield place
    place.stop()


@pytest.fixture
def make_learner(runtime: Runtime) -> Callable[..., Learner]:
    """A learner of the toy with weights by name; ``learner`` are the Learner's options, the rest the toy's config."""

    def make(optim: Any = None, learner: dict[str, Any] | None = None, **config: Any) -> Learner:
        model = build_toy(Layout(distributed_optimizer=runtime.distributed_optimizer), **config)
        fill_by_name(model)
        return Learner([model], runtime, optim or Optim(), total_steps=20, **(learner or {}))

    return make
