"""What goes wrong inside a child of the fork server, by name."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch


def ctrl_c_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def poison_annealing() -> None:
    """From now on every loss of annealing is NaN."""
    from r4b_core.stages import anneal

    head = anneal.sft_head

    def poisoned(*arguments: Any) -> tuple[torch.Tensor, ...]:
        loss, denominator, metrics = head(*arguments)
        return loss * float("nan"), denominator, metrics

    anneal.sft_head = poisoned
