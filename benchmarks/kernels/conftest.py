"""What every kernel benchmark shares: `contest` times us, the rivals and the floor, and a table is printed at the end.

    pytest benchmarks/kernels/prefix_attention.py

Times are host time. The ratios come from turns (us, each rival, us again, ...) of which the least counts, so that a
neighbour on the machine burdens all alike. pytest-benchmark's own statistics of us stand beside them. The floor is the
time that the counted bytes and FLOPs take at this machine's own copy and float32 matmul rates, measured at the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS = pytest.StashKey[list]()


def least_seconds(functions: dict[str, Callable[[], Any]], budget: float = 2.0, rounds: int = 15) -> dict[str, float]:
    """The least time of a call to each, in turns, after a warm-up; at most ``rounds`` and about ``budget`` seconds."""
    for function in functions.values():
        function()
    least = dict.fromkeys(functions, float("inf"))
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
        if time.perf_counter() - begin > budget:
            break
    return least


@pytest.fixture(scope="session")
def machine() -> dict[str, float]:
    """{"flops": float32 matmul FLOP/s, "bytes": copy bytes/s, read and write counted}, on the threads in use."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    source = torch.randn(2**23)
    target = torch.empty_like(source)
    least = least_seconds({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "flops": 2 * 768**3 / least["matmul"],
        "bytes": 2 * source.nbytes / least["copy"],
    }


@pytest.fixture
def contest(benchmark: Any, machine: dict[str, float], request: pytest.FixtureRequest) -> Callable[..., None]:
    """contest(ours, rivals={name: function}, bytes_moved=, flops=): ours is the benchmark, the rest its extra_info."""

    def run(ours: Callable, rivals: dict[str, Callable], *, bytes_moved: int, flops: int) -> None:
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
        seconds = least_seconds({"ours": ours, **rivals})
        mine = seconds.pop("ours")
        floor = max(flops / machine["flops"], bytes_moved / machine["bytes"])
        benchmark.extra_info.update(
            bytes=bytes_moved,
            flops=flops,
            floor_seconds=floor,
            ours=mine,
            rivals=seconds,
            times_faster={name: value / mine for name, value in seconds.items()},
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        request.config.stash.setdefault(ROWS, []).append((request.node.name, mine, floor, seconds))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.write_line(
        f"{'case':44} {'ours ms':>9} {'floor ms':>9} {'of floor':>9}  rivals: ms (ours is times faster)"
    )
    for name, mine, floor, seconds in rows:
        others = ", ".join(f"{rival} {value * 1e3:.2f} ({value / mine:.2f}x)" for rival, value in seconds.items())
        terminalreporter.write_line(f"{name:44} {mine * 1e3:9.2f} {floor * 1e3:9.2f} {floor / mine:9.2f}  {others}")
