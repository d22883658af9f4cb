"""group_advantage against vectorised torch and the loop over groups that trainers keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels._machine import ON_GPU
from r4b_kernels import group_advantage


@pytest.mark.parametrize("baseline", ["union", "per_mode"])
@pytest.mark.parametrize("responses", [1024, 4096])
def test_group_advantage(responses: int, baseline: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    size = 16
    rewards = torch.randint(0, 2, (responses,)).float()
    offsets = torch.arange(0, responses + 1, size)
    mode = torch.arange(responses) % 2
    token_offsets = torch.arange(responses + 1) * 16

    def run(backend: str | None) -> object:
        return group_advantage(
            rewards,
            offsets,
            mode,
            baseline=baseline,
            token_offsets=token_offsets,
            num_tokens=responses * 16,
            backend=backend,
        )

    def loop() -> object:
        by_group: dict[int, list[torch.Tensor]] = {}
        for index in range(responses):
            by_group.setdefault(index // size, []).append(rewards[index])
        parts = []
        for values in by_group.values():
            scores = torch.stack(values)
            parts += [(score - scores.mean()) / (scores.std() + 1e-6) for score in values]
        return torch.stack(parts).repeat_interleave(16)

    def vectorised() -> torch.Tensor:
        """As a trainer with groups of one size writes it."""
        grouped = rewards.view(-1, size)
        scores = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
        return scores.flatten().repeat_interleave(16)

    rivals: dict[str, Callable[[], object]] = {"torch, groups of one size": vectorised}
    if ON_GPU:
        rivals["ours in CUDA C++"] = lambda: run("cuda")
    if responses == 1024 and baseline == "union":
        rivals["loop over responses"] = loop
    contest(lambda: run(None), rivals, bytes_moved=rewards.nbytes * 18, flops=10 * responses)
