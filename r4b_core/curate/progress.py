"""What a stage shows while it goes: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, total: int | None, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done.

    Args:
        title: such as ``verify``.
        total: records in all, or None where nobody knows yet.
    """
    console = console or Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield _lines(title, total, console)
        return
    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, advance=count)


def _lines(title: str, total: int | None, console: Console) -> Callable[[int], None]:
    done, start = 0, time.monotonic()
    shown = start

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            of = f"/{total:,}" if total else ""
            console.print(f"{title}: {done:,}{of} records, {done / (now - start):,.0f}/s", markup=False)

    return advance
