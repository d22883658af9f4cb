"""Checkpoints from Hugging Face under layouts of two ranks: every parameter is what one rank has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from r4b_core.models.convert import find_like, load_weights, read_config, to_huggingface, to_megatron
from r4b_core.models.families import build_chunks, build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import start
from r4b_core.telemetry.locate import locate
from tests.models.convert_cases import SHAPES, canonical, write_theirs
from tests.parallel.harness import Layout, Optim, parameters_by_name

LAYOUTS = {
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "pp2_v2": Layout(pp=2, virtual_stages=2),
}
# What two ranks divide.
HEADS: dict[str, Any] = {
    "r4b": dict(vision_num_heads=4, num_layers=4),
    "qwen3_vl": dict(vision_num_heads=2, num_layers=8),
}


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    """Instead of the folder's world of one."""


@pytest.mark.parametrize("family", SHAPES)
def test_every_layout_loads_and_exports_the_same(family: str) -> None:
    folder = Path(os.environ["R4B_TEST_SHARED"]) / family
    rank = int(os.environ["RANK"])
    if rank == 0:
        write_theirs(folder / "theirs", family, tie=True, **HEADS[family])
        to_megatron(folder / "theirs", folder / "megatron", part_bytes=60_000)
    runtime = start(Layout(), seed=0)
    runtime.barrier()
    config = read_config(folder / "theirs")
    model = build_model(config, Layout(), seed=1)
    load_weights(model, folder / "theirs")
    want = parameters_by_name(model)
    runtime.stop()

    path = locate(folder / "megatron")[0]
    for name, layout in LAYOUTS.items():
        runtime = start(layout, seed=0)
        try:
            direct, loaded = (build_chunks(config, layout, seed=seed) for seed in (2, 3))
            for chunk in direct:
                load_weights(chunk, folder / "theirs")
            checkpoint.load_weights(path, loaded)
            for chunks in (direct, loaded):
                got = parameters_by_name(chunks)
                assert got.keys() == want.keys(), name
                assert all(torch.equal(got[key], value) for key, value in want.items()), name
            # As training saves it: the parts that each rank holds.
            learner = Learner(loaded, runtime, Optim(), total_steps=1)
            saved = checkpoint.save(folder / name, 1, learner, {})
            if rank == 0:
                to_huggingface(saved, config, find_like(folder / "megatron", config), folder / f"back_{name}")
                back, theirs = (canonical(folder / part, family) for part in (f"back_{name}", "theirs"))
                assert back.keys() == theirs.keys()
                assert all(torch.equal(value, theirs[key]) for key, value in back.items()), name
        finally:
            runtime.stop()
