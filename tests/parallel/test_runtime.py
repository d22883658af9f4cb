from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from r4b_core.parallel import collectives, rng
from r4b_core.parallel.runtime import LayoutError, Runtime, check_layout, start
from tests.parallel.harness import Layout


def test_a_world_of_one(runtime: Runtime) -> None:
    assert (runtime.rank, runtime.world, runtime.tp, runtime.pp, runtime.cp, runtime.dp) == (0, 1, 1, 1, 1, 1)
    assert runtime.is_main and runtime.is_first_stage and runtime.is_last_stage
    assert runtime.last_stage_source == 0
    assert runtime.gather({"a": [1]}) == [{"a": [1]}] and runtime.broadcast_object((1, 2)) == [1, 2]
    assert runtime.any(True) and not runtime.any(False)


@pytest.mark.parametrize(
    "layout,world,words",
    [
        (Layout(tp=2), 1, "does not divide the 1 rank of"),
        (Layout(tp=2, pp=2), 6, "torchrun --nproc-per-node=4"),
        (Layout(tp=0), 2, "parallel.tp = 0"),
        (Layout(sequence_parallel=True), 2, "raise tp or turn it off"),
        (Layout(pp=2, virtual_stages=0), 2, "parallel.virtual_stages = 0: must be 1"),
        (Layout(virtual_stages=2), 2, "parallel.virtual_stages = 2: interleaving needs parallel.pp >= 2"),
    ],
)
def test_a_layout_that_does_not_fit(layout: Layout, world: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        check_layout(layout, world)


def test_data_parallel_is_what_is_left_over() -> None:
    assert check_layout(Layout(tp=2, pp=2), 16) == 4
    assert check_layout(Layout(cp=2), 2) == 1


def test_starting_twice_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"Runtime\.stop\(\)"):
        start(Layout(), seed=1)


def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="has RANK, WORLD_SIZE but not MASTER_ADDR, MASTER_PORT: start with torchrun"):
        start(Layout(), seed=1)


def test_the_timeout_is_the_groups(runtime: Runtime) -> None:
    backend = runtime.tp_group._get_backend(torch.device("cpu"))
    assert backend.options._timeout.total_seconds() == Layout().timeout_s == runtime.timeout_s


def test_seed_repeats(runtime: Runtime) -> None:
    first = torch.rand(2)
    runtime.stop()
    start(Layout(), seed=1)
    assert torch.equal(torch.rand(2), first)


def test_random_state_survives_json(runtime: Runtime) -> None:
    import json
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    def draw() -> list[float]:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            forked = torch.rand(1).item()
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), forked]

    draw()
    state = json.loads(json.dumps(rng.capture()))
    first = draw()
    assert draw() != first
    rng.restore(state)
    assert draw() == first


def test_trees_come_back_in_one_piece() -> None:
    tensors: list[torch.Tensor] = []
    value = {"x": torch.arange(3), "y": [torch.zeros(2, 2, dtype=torch.bfloat16), 1.5, "s", None]}
    skeleton = collectives._strip(value, tensors)
    empty: list[torch.Tensor] = []
    collectives._allocate(skeleton, empty, torch.device("cpu"))
    assert [(t.dtype, t.shape) for t in empty] == [(t.dtype, t.shape) for t in tensors]
    back = collectives._restore(skeleton, iter(tensors))
    assert torch.equal(back["x"], value["x"]) and back["y"][1:] == [1.5, "s", None]


def test_stop_keeps_the_world(runtime: Runtime) -> None:
    runtime.stop()
    assert dist.is_initialized()
    assert len(dist.distributed_c10d._world.pg_map) == 1
