"""Runs of the `r4b` command in forked children, so that ten of them pay for their imports once.

The server is a process of its own that computes nothing, so its children inherit no thread and no lock. Each child can
be told to fail at one exact place.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "r4b_core.cli.main",
    "r4b_core.stages.demo",
    "r4b_core.evaluate.run",
    "r4b_core.evaluate.generate",
    "sklearn.datasets",
    "pyarrow.parquet",
    "pyarrow.dataset",
    "plotly.graph_objects",
    "plotly.io",
    "torch._dynamo",
    "torch._inductor",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (negative for a signal), and everything that it printed."""

    status: int
    output: str


class ForkServer:
    """Starts children that run `r4b` with given arguments."""

    def __init__(self) -> None:
        path = os.pathsep.join(str(folder) for folder in (ROOT / "kernels", ROOT))
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TORCHELASTIC_"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            clean.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stages.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *arguments: object, events: Sequence[Mapping[str, Any]] = (), cwd: Path = ROOT) -> Ended:
        """Run `r4b` with the arguments.

        Args:
            events: a chain of places; each counts from when the one before was reached. ``at`` is "module:function",
                ``nth`` its call, ``match`` a pattern that the call's arguments must hold, ``when`` "before" or "after"
                the call, ``do`` "KILL" (what the last one does by default), "INT", "TERM", or a "module:function".
            cwd: where the command is run.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            job = {"argv": [str(a) for a in arguments], "events": list(events), "out": output.name, "cwd": str(cwd)}
            print(json.dumps(job), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
            assert reply, "the fork server died"
            return Ended(int(reply), output.read())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def _serve() -> None:
    importlib.import_module("r4b_core.parallel.device").activate()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the children's collections need not visit what is only there to be shared
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(job)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(job: dict[str, Any]) -> None:
    status = 70
    try:
        out = os.open(job["out"], os.O_WRONLY)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        os.chdir(job["cwd"])
        if job["events"]:
            _arm(job["events"])
        from r4b_core.cli.main import app

        started = time.process_time()
        app(job["argv"], prog_name="r4b")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if "R4B_TIMES" in os.environ:
            print("cpu seconds", time.process_time() - started)
            sys.stdout.flush()
        os._exit(status)


def _arm(events: list[dict[str, Any]]) -> None:
    first, rest = events[0], events[1:]
    owner, name = _resolve(first["at"])
    original = getattr(owner, name)
    seen = 0

    def act() -> None:
        if rest:
            _arm(rest)
        deed = first.get("do", "" if rest else "KILL")
        if deed in ("KILL", "INT", "TERM"):
            sys.stdout.flush()
            os.kill(os.getpid(), signal.Signals["SIG" + deed])
        elif deed:
            holder, function = _resolve(deed)
            getattr(holder, function)()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        mine = re.search(first.get("match", ""), repr(args)) is not None
        seen += mine
        due = mine and seen == first.get("nth", 1)
        if due and first.get("when", "before") == "before":
            act()
        result = original(*args, **kwargs)
        if due and first.get("when") == "after":
            act()
        return result

    setattr(owner, name, wrapper)


def _resolve(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


if __name__ == "__main__":
    _serve()
