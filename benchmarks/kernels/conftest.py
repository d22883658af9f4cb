"""What every kernel benchmark shares: `contest` times us, the rivals and the floor, and a table is printed at the end.

    pytest benchmarks/kernels/prefix_attention.py

The same cases run on a GPU (`r4b bench kernels` there, or benchmarks/gpu_suite.sh): tensors are made on it, and
`_machine.on` picks the shapes. The floor is the time of the counted bytes and FLOPs at the machine's own copy and
matmul rates, measured at the start. A rival that is not installed, or cannot do a case, is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.kernels import _machine

ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session", autouse=True)
def _tensors_on_the_device() -> Iterator[None]:
    with _machine.DEVICE:
        yield


@pytest.fixture(scope="session")
def ceiling() -> _machine.Ceiling:
    return _machine.measure_ceiling()


@pytest.fixture
def contest(benchmark: Any, ceiling: _machine.Ceiling, request: pytest.FixtureRequest) -> Callable[..., None]:
    """contest(ours, rivals={name: function}, bytes_moved=, flops=, skipped={name: reason}, ideal={name: ratio}).

    Ours is the benchmark; the rest goes to its extra_info. ``flops`` are the useful ones, masked pairs not counted.
    ``ideal`` holds the ratio to a rival's time that the FLOPs saved would give.
    """

    def run(
        ours: Callable[[], Any],
        rivals: dict[str, Callable[[], Any]],
        *,
        bytes_moved: int,
        flops: int,
        skipped: dict[str, str] | None = None,
        ideal: dict[str, float] | None = None,
    ) -> None:
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
        able, skipped = {}, dict(skipped or {})
        for name, rival in rivals.items():
            try:
                rival()
                able[name] = rival
            except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError too
                skipped[name] = str(error).strip().splitlines()[0][:100] or type(error).__name__
                if _machine.ON_GPU:
                    torch.cuda.empty_cache()
        seconds = _machine.least_seconds({"ours": ours, **able})
        mine = seconds.pop("ours")
        floor = ceiling.floor(flops, bytes_moved)
        benchmark.extra_info.update(
            bytes=bytes_moved,
            flops=flops,
            floor_seconds=floor,
            ours=mine,
            rivals=seconds,
            skipped=skipped,
            ideal=ideal or {},
            ceiling={"flops": ceiling.flops, "bytes": ceiling.bytes},
            device=torch.cuda.get_device_name() if _machine.ON_GPU else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        if _machine.ON_GPU:
            benchmark.extra_info.update(device_seconds=mine, peak_bytes=_machine.peak_bytes(ours))
        request.config.stash.setdefault(ROWS, []).append((request.node.name, mine, floor, seconds, ideal or {}))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.write_line(
        f"{'case':44} {'ours ms':>9} {'floor ms':>9} {'of floor':>9}  rivals: ms (ours is times faster)"
    )
    for name, mine, floor, seconds, ideal in rows:
        others = ", ".join(
            f"{rival} {value * 1e3:.2f} ({value / mine:.2f}x"
            + (f", {value / mine / ideal[rival]:.2f} of the ideal {ideal[rival]:.2f}x)" if rival in ideal else ")")
            for rival, value in seconds.items()
        )
        terminalreporter.write_line(f"{name:44} {mine * 1e3:9.3f} {floor * 1e3:9.3f} {floor / mine:9.2f}  {others}")
