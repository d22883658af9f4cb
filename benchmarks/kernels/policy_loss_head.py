"""policy_loss_head, forward and backward, with all rows live and with half of them dead; its peak memory on the CPU.

pytest benchmarks/kernels/policy_loss_head.py -m slow        the peak memory, at T=2048, H=512, V=151936: minutes
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import DEVICE, DTYPE, ON_GPU, on
from r4b_kernels import policy_loss_head

LOADS = on(
    {"T1500_H128_V64": (1500, 128, 64), "T512_H256_V32768": (512, 256, 32768)},
    {"T8192_H4096_V151936": (8192, 4096, 151936), "T8192_H2560_V151936": (8192, 2560, 151936)},
)
SEQUENCES = 4
MEMORY_LOAD = 2048, 512, 151936


class Case:
    """A head whose last rows are dead, and the loss by us and as one composes it in torch."""

    def __init__(self, tokens: int, width: int, vocabulary: int, live: float) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width, dtype=DTYPE, device=DEVICE, requires_grad=True)
        weight = torch.randn(vocabulary, width, dtype=DTYPE, device=DEVICE) / width**0.5
        self.weight = weight.requires_grad_()
        self.target = torch.randint(vocabulary, (tokens,), device=DEVICE)
        self.per_sequence = torch.randn(SEQUENCES, device=DEVICE)
        self.per_sequence[int(live * SEQUENCES) :] = 0.0
        self.advantage = self.per_sequence.repeat_interleave(tokens // SEQUENCES)
        self.row_weight = torch.full((tokens,), 1.0 / tokens, device=DEVICE)
        with torch.no_grad():
            parts = zip(self.hidden.split(256), self.target.split(256), strict=True)
            self.old = torch.cat([self._logprob(*part) for part in parts])

    def _logprob(self, hidden: Tensor, target: Tensor) -> Tensor:
        log_p = torch.log_softmax((hidden @ self.weight.T).float(), -1)
        return log_p.gather(1, target[:, None]).squeeze(1)

    def composed(self) -> tuple[Tensor, ...]:
        ratio = torch.exp(self._logprob(self.hidden, self.target) - self.old)
        surrogate = torch.min(ratio * self.advantage, ratio.clamp(0.8, 1.2) * self.advantage)
        return self.gradients(-(self.row_weight * surrogate).sum())

    def fused(self) -> tuple[Tensor, ...]:
        head = self.hidden, self.weight, self.target
        return self.gradients(policy_loss_head(*head, self.old, self.advantage, self.row_weight).loss)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def bare_products(self) -> object:
        h, w = self.hidden.detach(), self.weight.detach()
        z = h @ w.T
        return z @ w, z.T @ h


@pytest.mark.parametrize("live", [1.0, 0.5], ids=["all_live", "half_live"])
@pytest.mark.parametrize("load", LOADS)
def test_policy_loss_head(load: str, live: float, contest: Callable[..., None]) -> None:
    tokens, width, vocabulary = LOADS[load]
    case = Case(tokens, width, vocabulary, live)
    for mine, theirs in zip(case.fused(), case.composed(), strict=True):
        assert (mine - theirs).norm() <= (2e-2 if ON_GPU else 1e-4) * theirs.norm()
    rivals: dict[str, Callable[[], object]] = {"torch composed": case.composed, "bare products": case.bare_products}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        chunked = LigerFusedLinearGRPOLoss(beta=0.0, compiled=ON_GPU, use_ref_model=False, loss_type="bnpo")
        by_sequence = (SEQUENCES, tokens // SEQUENCES)
        mask = torch.ones(by_sequence, device=DEVICE)
        rivals["Liger chunked" + on(", eager", "")] = lambda: case.gradients(
            chunked(
                case.hidden.view(*by_sequence, width),
                case.weight,
                case.target.view(by_sequence),
                mask,
                case.per_sequence,
                old_per_token_logps=case.old.view(by_sequence),
            )[0]
        )
    contest(
        case.fused,
        rivals,
        bytes_moved=2 * (case.hidden.nbytes + 2 * case.weight.nbytes),
        flops=int(2 * (1 + 2 * live) * tokens * width * vocabulary),
    )


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="on a GPU the other cases measure it")
def test_peak_memory_on_the_cpu() -> None:
    """At most 0.12 of the materialised version's memory beyond the inputs, and at most its time."""
    root = Path(__file__).parents[2]
    measured = {}
    for name in ("fused", "composed"):
        command = [sys.executable, "-m", "benchmarks.kernels.policy_loss_head", name]
        path = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, cwd=root, env=path, capture_output=True, text=True, check=True).stdout
        measured[name] = tuple(map(float, output.split()))
        print(f"{name}: {measured[name][0] / 2**20:.0f} MiB, {measured[name][1]:.1f} s")
    (memory, duration), (their_memory, their_duration) = measured["fused"], measured["composed"]
    assert memory <= 0.12 * their_memory and duration <= their_duration


def main() -> None:
    """Print the peak bytes, gradients included, and the seconds of one call at ``MEMORY_LOAD``."""
    name = sys.argv[1]
    getattr(Case(SEQUENCES, 8, 16, 1.0), name)()
    case = Case(*MEMORY_LOAD, 1.0)
    peak, done = 0, threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher, before, start = threading.Thread(target=watch), resident(), time.perf_counter()
    watcher.start()
    getattr(case, name)()
    duration = time.perf_counter() - start
    done.set()
    watcher.join()
    print(peak - before, duration)


if __name__ == "__main__":
    main()
