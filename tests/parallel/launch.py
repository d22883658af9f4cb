"""Run a pytest file or a script on several ranks of this machine, as torchrun does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TAIL = 6000


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with one thread per rank and the repository on the path."""
    path = os.pathsep.join(str(folder) for folder in (ROOT / "kernels", ROOT, Path(__file__).parent))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, (path, clean.get("PYTHONPATH", ""))))
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


def run_ranks(target: Path | str, ranks: int, *args: str, timeout: float = 600.0, pytest: bool = True) -> str:
    """Run ``target`` on ``ranks`` ranks and return rank 0's output.

    With ``pytest`` every rank runs the same tests of the file in the same order and stops at its first failure.

    Raises:
        AssertionError: a rank failed or the launch ran out of time; the message ends with every rank's output.
    """
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["--redirects=3", f"--log-dir={logs}"]
        if pytest:
            command += ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
            command += ["-W", "ignore::DeprecationWarning"]
        command += [str(target), *args]
        launcher = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, errors = launcher.communicate(timeout=timeout)
            failure = f"exit status {launcher.returncode}\n{errors[-TAIL:]}" if launcher.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"no end after {timeout} s"
            end(launcher)
        outputs = {
            f"{path.parent.name}/{path.name}": path.read_text(errors="replace")
            for path in sorted(Path(logs).rglob("std*.log"))
        }
    if failure:
        tails = "\n".join(f"--- rank {name}\n{text[-TAIL:]}" for name, text in outputs.items() if text.strip())
        raise AssertionError(f"{Path(target).name} on {ranks} ranks: {failure}\n{tails}")
    return outputs.get("0/stdout.log", "")


def end(launcher: subprocess.Popen[str]) -> None:
    """Kill the launcher and its ranks, which lead process groups of their own."""
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    launcher.communicate()


def run_python(script: str, *args: str, timeout: float = 300.0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run source text in a fresh process of one rank."""
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        env=environment(**extra),
        cwd=ROOT,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
