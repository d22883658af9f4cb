"""One rank of test_vocabulary_parallel.py: runs every case on its shard of the vocabulary and saves what it got.

Usage: python vocabulary_parallel_worker.py RANK WORLD_SIZE RENDEZVOUS_FILE CASES RESULTS

With TRITON_INTERPRET=1 in the environment the triton backend runs too, in the interpreter.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from r4b_kernels import linear_logprob, policy_loss_head

BACKENDS = ["cpu", "reference"]
if os.environ.get("TRITON_INTERPRET") == "1" and __name__ == "__main__":
    from interpreter import shim

    shim.install()
    BACKENDS.append("triton")


def run(case: dict, weight: torch.Tensor, group: dist.ProcessGroup | None, backend: str) -> dict[str, torch.Tensor]:
    """Results and gradients of both head ops for one case; ``weight`` is this rank's shard, or all of it."""
    rows, (seed, seed_entropy) = case["rows"], case["seeds"]
    results = {}

    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        return case["hidden"].clone().requires_grad_(), weight.clone().requires_grad_()

    h, w = leaves()
    logprob, entropy = linear_logprob(h, w, rows["target"], temperature=0.7, group=group, backend=backend)
    (logprob @ seed + entropy @ seed_entropy).backward()
    results |= {"logprob": logprob, "entropy": entropy, "logprob hidden": h.grad, "logprob weight": w.grad}
    h, w = leaves()
    loss = policy_loss_head(h, w, **rows, kl_coef=0.1, temperature=0.7, group=group, backend=backend)
    loss.loss.backward()
    results |= {"loss": loss.loss, "ratio": loss.ratio, "kl": loss.kl, "clipped": loss.clipped}
    results |= {"loss hidden": h.grad, "loss weight": w.grad}
    return {name: value.detach() for name, value in results.items()}


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    rendezvous, cases_path, results_path = sys.argv[3:]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    group = dist.new_group(list(range(size)))
    results = []
    for case in torch.load(cases_path, weights_only=True):
        shard = case["weight"].chunk(size)[rank]
        results.append({backend: run(case, shard, group, backend) for backend in BACKENDS})
    torch.save(results, f"{results_path}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
