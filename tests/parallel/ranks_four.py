"""Cases of four ranks, run by ``test_ranks`` under torchrun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import start
from tests.parallel.harness import Layout, Optim, compare_layouts, fill_by_name, train
from tests.parallel.toy import build_toy, toy_batches, toy_loss

LAYOUTS = {
    "dp4": Layout(),
    "tp2_dp2": Layout(tp=2),
    "tp2_sp_pp2": Layout(tp=2, pp=2, sequence_parallel=True),
    "pp2_dp2": Layout(pp=2),
}


def test_layouts_give_the_gradient_of_one_rank() -> None:
    compare_layouts(build_toy, toy_batches(8), toy_loss, LAYOUTS, tolerance=5e-6)


@pytest.mark.parametrize("saved,loaded", [("tp2_sp_pp2", "dp4"), ("tp2_dp2", "pp2_dp2")])
def test_a_checkpoint_continues_in_any_layout(saved: str, loaded: str) -> None:
    losses, folder = {}, Path(os.environ["R4B_TEST_SHARED"]) / f"{saved}-{loaded}"
    for name in (saved, loaded):
        runtime = start(LAYOUTS[name], seed=1)
        model = build_toy(LAYOUTS[name])
        fill_by_name(model)
        learner = Learner([model], runtime, Optim(), total_steps=10)
        if name == saved:
            train(learner, runtime, toy_batches(8), toy_loss, 2)
            path = checkpoint.save(folder, 2, learner, {})
        else:
            checkpoint.load(path, learner)
        losses[name] = [result.loss for result in train(learner, runtime, toy_batches(8), toy_loss, 2)]
        runtime.stop()
    assert losses[loaded] == pytest.approx(losses[saved], rel=5e-6)
