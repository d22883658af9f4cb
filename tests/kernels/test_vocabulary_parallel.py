"""The head ops over two gloo ranks, each with half of the vocabulary, equal the same ops on one rank."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r4b_kernels import linear_logprob
from tests.kernels.test_policy_loss_head import make
from tests.kernels.vocabulary_parallel_worker import run

RANKS = 2
SHAPES = [(1, 3, 4), (37, 11, 54), (129, 16, 256), (20, 8, 64)]
PEAKED = len(SHAPES) - 1  # its logits are some hundreds, so that one shard may hold next to nothing of a row
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def cases_and_results(tmp_path_factory: pytest.TempPathFactory):
    """Every case goes through one launch of the ranks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vocabulary_parallel")
    cases = []
    for shape in SHAPES:
        hidden, weight, rows = make(*shape)
        if shape == SHAPES[PEAKED]:
            hidden *= 100.0
            logprob, _ = linear_logprob(hidden, weight, rows["target"], temperature=0.7, backend="reference")
            rows["old_logprob"] = logprob + 0.4 * torch.randn(shape[0])
        seeds = (torch.randn(shape[0], dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64))
        cases.append({"hidden": hidden, "weight": weight, "rows": rows, "seeds": seeds})
    torch.save(cases, folder / "cases.pt")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'kernels'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    if HAS_TRITON:
        environment["TRITON_INTERPRET"] = "1"
    worker = Path(__file__).with_name("vocabulary_parallel_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(RANKS), folder / "rendezvous", folder / "cases.pt", folder / "out"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=300)
            assert rank.returncode == 0, stderr
    finally:
        for rank in ranks:
            rank.kill()
    return cases, [torch.load(f"{folder / 'out'}.{rank}", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize(
    "backend",
    ["cpu", "reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no triton"))],
)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_two_ranks_equal_one(index: int, backend: str, cases_and_results) -> None:
    cases, results = cases_and_results
    whole = run(cases[index], cases[index]["weight"], None, "reference")
    ranks = [results[rank][index][backend] for rank in range(RANKS)]
    for name, expected in whole.items():
        for rank, mine in enumerate(ranks):
            part = expected.chunk(RANKS)[rank] if name.endswith("weight") else expected
            torch.testing.assert_close(mine[name], part, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    for name in whole:
        if not name.endswith("weight"):
            assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
