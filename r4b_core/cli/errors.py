"""How a command ends: one line for a user's mistake, 130 for Ctrl-C, a traceback for a mistake of ours."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from r4b_core.cli.output import is_main_rank, rank

USER_ERROR = 2
INTERRUPTED = 130


class CommandGroup(TyperGroup):
    """Turns exceptions into messages and exit codes. ``--debug`` may stand anywhere on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:cut]:
            args = ["--debug", *(a for a in args[:cut] if a != "--debug"), *args[cut:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if is_main_rank() and str(interrupt):  # a stage that has saved says how to go on
                print(interrupt, file=sys.stderr, flush=True)
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError) as error:
            if ctx.params.get("debug") or not is_users(error):
                raise
            _print(error)
            raise typer.Exit(USER_ERROR) from None


def is_users(error: BaseException) -> bool:
    """Whether the user can mend an error: a file's OSError, or a ValueError that our own code raised.

    A ValueError that came out of torch, numpy or the like is a mistake of ours, and keeps its traceback.
    """
    if isinstance(error, OSError):
        return error.filename is not None
    return isinstance(error, ValueError) and _raised_in(error.__traceback__).split(".")[0] in (
        "r4b_core",
        "r4b_kernels",
    )


def _raised_in(where: TracebackType | None) -> str:
    name = ""
    for frame, _ in traceback.walk_tb(where):
        name = frame.f_globals.get("__name__", "")
    return "r4b_core.cli" if name == "__main__" else name


def _print(error: BaseException) -> None:
    from r4b_core.config.load import RecipeError

    if isinstance(error, RecipeError) and not is_main_rank():
        return  # every rank reads the same recipe: once is enough
    prefix = "error" if is_main_rank() else f"error on rank {rank()}"
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"{prefix}: {text}", file=sys.stderr, flush=True)
