"""Is an answer right? Rules decide nearly all answers (`rules.compare`), math-verify the rest in killable processes.

What the processes protect from: answers that take for ever, that eat memory, that recurse without end, or that crash
the interpreter. What they do not protect from: they run as the same user with the same network and file system, and
math-verify evaluates what it parses.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from r4b_core.rewards.rules import compare, for_mathematics
from r4b_core.rewards.verdict import Outcome, Verdict

__all__ = ["Outcome", "Verdict", "Verifier"]

_WORKER = Path(__file__).with_name("worker.py")
_STARTUP_S = 120.0


Question = str | None
"""A question helps the rules: its options, and what kind of number it asks for."""


class Verifier:
    """Compares answers with references. Worker processes start when the first one is needed.

    Attributes:
        counts: verdicts by outcome since the start.
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 1024, mathematics: bool = True
    ) -> None:
        """Args:
        workers: processes that verify at the same time.
        timeout_s: seconds for one answer; then its process is killed and replaced.
        memory_mb: address space of a process.
        mathematics: without it an answer that the rules do not settle is wrong, and no process runs.

        Raises:
            ValueError: if a setting is out of range.
        """
        for name, value, least in (
            ("workers", workers, 1),
            ("timeout_s", timeout_s, 0.01),
            ("memory_mb", memory_mb, 256),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        self.timeout_s, self.memory_mb, self.mathematics = timeout_s, memory_mb, mathematics
        self.counts: Counter[str] = Counter()
        self._workers: list[_Worker | None] = [None] * workers
        self._lock = threading.Lock()

    def verify(self, answer: str, gold: str, question: Question = None) -> Verdict:
        """The verdict on one answer."""
        return self.verify_many([(answer, gold)], [question])[0]

    def verify_many(
        self, pairs: Sequence[tuple[str, str]], questions: Sequence[Question] | None = None
    ) -> list[Verdict]:
        """The verdict on each (answer, reference), in order; equal ones are verified once.

        Args:
            questions: one per pair, or None for none at all.
        """
        asked = list(zip(pairs, questions or [None] * len(pairs), strict=True))
        verdicts = {key: compare(*key[0], key[1]) for key in dict.fromkeys(asked)}
        hard = list(dict.fromkeys(key[0] for key, verdict in verdicts.items() if verdict is None))
        solved: dict[tuple[str, str], Verdict] = {}
        if hard and not self.mathematics:
            solved = dict.fromkeys(hard, Verdict(Outcome.WRONG, "not the same text"))
        elif hard:
            readable = [(for_mathematics(answer), for_mathematics(gold)) for answer, gold in hard]
            solved = dict(zip(hard, self.in_workers(readable), strict=True))
        result = [verdicts[key] or solved[key[0]] for key in asked]
        self.counts.update(verdict.outcome for verdict in result)
        return result

    def close(self) -> None:
        """End the processes. The verifier may be used again and starts new ones."""
        with self._lock:
            for slot, worker in enumerate(self._workers):
                if worker is not None:
                    worker.kill()
                self._workers[slot] = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def in_workers(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (answer, reference) by math-verify alone, in order."""
        busy: dict[int, tuple[_Worker, int]] = {}
        with self._lock:
            try:
                return self._share_out(pairs, busy)
            finally:
                # After an interruption a busy process would give its late verdict to the next answer.
                for slot, (worker, _) in busy.items():
                    worker.kill()
                    self._workers[slot] = None

    def _share_out(self, pairs: Sequence[tuple[str, str]], busy: dict[int, tuple[_Worker, int]]) -> list[Verdict]:
        """Keep every process at work until all pairs have a verdict; ``busy`` tells which works on what."""
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(pairs)))
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                for slot in range(len(self._workers)):
                    if waiting and slot not in busy:
                        worker = self._workers[slot] or _Worker(self.memory_mb, self.timeout_s)
                        self._workers[slot] = worker
                        busy[slot] = worker, waiting.popleft()
                        worker.send(pairs[busy[slot][1]])
                        selector.register(worker.replies, selectors.EVENT_READ, slot)
                deadline = min(worker.deadline for worker, _ in busy.values())
                ready = {key.data for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                for slot, (worker, index) in list(busy.items()):
                    verdict = worker.receive() if slot in ready else None
                    if verdict is None and time.monotonic() >= worker.deadline:
                        verdict = worker.give_up()
                    if verdict is not None:
                        verdicts[index] = verdict
                        selector.unregister(worker.replies)
                        del busy[slot]
                    if worker.dead:
                        self._workers[slot] = None
        return [verdicts[index] for index in range(len(pairs))]


class _Worker:
    """One process that verifies one answer at a time."""

    def __init__(self, memory_mb: int, timeout_s: float) -> None:
        command = [sys.executable, "-P", str(_WORKER), str(memory_mb), str(timeout_s)]
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self.replies = self._process.stdin, self._process.stdout
        self._received = b""
        self._ready = False
        self._timeout_s = timeout_s
        self.deadline = 0.0
        self.dead = False

    def send(self, pair: tuple[str, str]) -> None:
        """Ask for a verdict; the time to import math-verify does not count."""
        self.deadline = time.monotonic() + (self._timeout_s if self._ready else _STARTUP_S)
        try:
            self._requests.write(json.dumps({"answer": pair[0], "gold": pair[1]}).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            # The process is gone: its reply pipe is at the end, and receive says so.
            return

    def receive(self) -> Verdict | None:
        """The verdict once its line is complete; undecided if the process has died."""
        data = os.read(self.replies.fileno(), 65536)
        if not data:
            self.kill()
            if not self._ready:
                raise self._never_ready()
            return Verdict(Outcome.UNDECIDED, f"the verifier process died ({self._process.returncode})")
        self._received += data
        while b"\n" in self._received:
            line, self._received = self._received.split(b"\n", 1)
            reply = json.loads(line)
            if "ready" in reply:
                self._ready = True
                self.deadline = time.monotonic() + self._timeout_s
            else:
                return Verdict(Outcome(reply["outcome"]), reply["reason"])
        return None

    def give_up(self) -> Verdict:
        """Kill the process because its time is over."""
        self.kill()
        if not self._ready:
            raise self._never_ready()
        return Verdict(Outcome.UNDECIDED, f"took more than {self._timeout_s:g} s to verify")

    def _never_ready(self) -> RuntimeError:
        return RuntimeError(
            f"the verifier process ended with {self._process.returncode} before it was ready: check that math-verify "
            f"can be imported by {sys.executable} within {_STARTUP_S:g} s"
        )

    def kill(self) -> None:
        """End the process at once and wait until it is gone."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self.replies):
            try:
                pipe.close()
            except BrokenPipeError:
                continue
