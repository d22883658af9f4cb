"""Where commands print: standard output, and only on rank 0 of a torchrun job."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def rank() -> int:
    """torchrun's ``RANK``, or 0 where nothing launched us."""
    return int(os.environ.get("RANK", "0"))


def is_main_rank() -> bool:
    return rank() == 0


def console() -> Console:
    """A console on standard output that is silent on other ranks; wide and plain where it is not a terminal."""
    from rich.console import Console

    made = Console(highlight=False, quiet=not is_main_rank())
    if not made.is_terminal:
        made.width = 160
    return made


def say(text: str) -> None:
    """One line of plain text, unwrapped, from the main rank."""
    if is_main_rank():
        print(text, flush=True)
