"""Runs a stage's partitions on a Ray cluster: the same function as the local runner, so the same bytes.

Plain tasks and not Ray Data: the unit of work must stay one partition in, one named file out, published by a rename
and skipped when it is there. Ray Data cuts its own blocks, names its own files and writes them as it goes. The folders
of input and output must be on storage that all nodes see.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
from typing import Any

from r4b_core.curate.runner import Advance, Process, Work, run_partition
from r4b_core.curate.store import Partition, StageError, StageStore

LOCAL = "local"
KNOCK_SECONDS = 10.0


def run_stage_on_ray(store: StageStore, work: Work, address: str, advance: Advance = lambda n: None) -> None:
    """Do every partition of the store that is not finished, as Ray tasks.

    Args:
        address: of a cluster ("auto", "ray://host:10001", "host:6379"), or "local" for one on this machine.

    Raises:
        StageError: ray is not installed, no cluster answers, the disk is full, the input cannot be read, or the process
            of a partition died twice.
    """
    pending = store.pending()
    if not pending:
        return
    ray = connect(address)
    # A try after the process died, none after an error of ours: that would come again.
    task = ray.remote(num_cpus=1, max_retries=1, retry_exceptions=False)(_do)
    running = {task.remote(store, partition, work): partition for partition in pending}
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            partition = running.pop(done)
            refusal, records = _result(ray, done, store, partition)
            if refusal:
                raise StageError(refusal)
            advance(records)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def connect(address: str) -> Any:
    """The ray module, connected.

    Raises:
        StageError: ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise StageError("--ray: ray is not installed: pip install 'r4b[ray]', or leave --ray out") from None
    if not ray.is_initialized():
        _knock(address)
        try:
            alone = address == LOCAL
            ray.init(
                address="local" if alone else address, log_to_driver=False, include_dashboard=False if alone else None
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StageError(f"--ray {address}: no Ray cluster answers there ({error}); `local` starts one") from error
    return ray


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would wait there for minutes."""
    if address in (LOCAL, "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit():
        raise StageError(f"--ray {address}: an address is local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise StageError(f"--ray {address}: no Ray cluster answers there ({error}); `local` starts one") from error


def _result(ray: Any, reference: Any, store: StageStore, partition: Partition) -> tuple[str, int]:
    try:
        return ray.get(reference)
    except ray.exceptions.WorkerCrashedError as error:
        raise StageError(
            f"{store.folder}: the process of {partition.name} ({partition.path}) died twice, as when memory runs out; "
            "finished partitions are safe: run the same command again on larger nodes"
        ) from error


def _do(store: StageStore, partition: Partition, work: Work) -> tuple[str, int]:
    """One partition, on a node: why it was refused, or "" and how many records were read."""
    told: list[int] = []
    try:
        if not store.is_finished(partition):
            run_partition(store, partition, _opened(store, work), told.append)
    except StageError as error:
        return str(error), 0
    return "", sum(told)


_open: dict[tuple[str, str, str], Process] = {}


def _opened(store: StageStore, work: Work) -> Process:
    """The work on a stage, opened once in each of Ray's processes and closed at its end."""
    key = (str(store.folder), store.stage, store.fingerprint)
    if key not in _open:
        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        _open[key] = stack.enter_context(work.open())
    return _open[key]
