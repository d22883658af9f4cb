"""One rank of test_linear_distill.py's two: runs every case on its shard of the vocabulary and saves what it got.

Usage: python linear_distill_worker.py RANK WORLD_SIZE RENDEZVOUS_FILE CASES RESULTS
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r4b_kernels import linear_distill


def run(case: dict, weight: torch.Tensor, group: dist.ProcessGroup | None, backend: str) -> dict[str, torch.Tensor]:
    """Results and gradients of one case; ``weight`` is this rank's shard, or all of it."""
    h, w = case["hidden"].clone().requires_grad_(), weight.clone().requires_grad_()
    results = linear_distill(h, w, **case["rows"], **case["options"], group=group, backend=backend)
    results.loss.backward()
    named = {name: value.detach() for name, value in results._asdict().items()}
    return named | {"hidden": h.grad, "weight": w.grad}


def launch(ranks: int, cases: list[dict], folder: Path) -> list[list[dict[str, Any]]]:
    """The results of every rank, for every case a dictionary by backend."""
    torch.save(cases, folder / "cases.pt")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root / 'kernels'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    arguments = [folder / "rendezvous", folder / "cases.pt", folder / "out"]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(ranks), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    return [torch.load(f"{folder / 'out'}.{rank}", weights_only=True) for rank in range(ranks)]


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    rendezvous, cases_path, results_path = sys.argv[3:]
    torch.set_num_threads(1)
    if importlib.util.find_spec("triton"):
        from interpreter import shim  # beside this script

        shim.install()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    group = dist.new_group(list(range(size)))
    results = []
    for case in torch.load(cases_path, weights_only=True):
        shard = case["weight"].chunk(size)[rank]
        results.append({backend: run(case, shard, group, backend) for backend in case["backends"]})
    torch.save(results, f"{results_path}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
