"""The verifier's worker process: reads one JSON request per line, writes one JSON verdict per line.

Run as a script by `verify.Verifier`; it imports nothing of this project. Its address space, its files and the time of
each request are limited by the kernel: past the time it is ended by a signal that Python cannot delay, so it does not
outlive a trainer that was killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
from typing import Any


def limit_process(memory_mb: int) -> None:
    """No core files, no file growth, few open files, ``memory_mb`` of address space (macOS does not enforce that)."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_AS, memory_mb * 2**20),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            if sys.platform != "darwin":
                raise


def compare(answer: str, gold: str) -> tuple[str, str]:
    """(outcome, reason) by math-verify. The gold is read as mathematics; the answer as prose, then as mathematics."""
    from math_verify import parse, verify

    def read(text: str, wrap: bool) -> list[Any]:
        return parse(f"${text}$" if wrap and "$" not in text else text, parsing_timeout=None)

    expected = read(gold, wrap=True)
    if all(isinstance(part, str) for part in expected):
        return "undecided", "the reference answer is not mathematics that can be parsed"
    parsed = False
    for wrap in (False, True):
        found = read(answer, wrap)
        parsed = parsed or any(not isinstance(part, str) for part in found)
        if found and verify(expected, found, timeout_seconds=None):
            return "right", "equal by math-verify"
    if not parsed:
        return "undecided", "the answer is not mathematics that can be parsed"
    return "wrong", "differs by math-verify"


def main() -> None:
    memory_mb, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401

    limit_process(memory_mb)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(math.ceil(timeout_s) + 1)
        try:
            outcome, reason = compare(request["answer"], request["gold"])
        except (RecursionError, MemoryError) as error:
            outcome, reason = "undecided", f"too complex to verify ({type(error).__name__})"
        except Exception as error:
            outcome, reason = "undecided", f"math-verify failed ({type(error).__name__})"
        signal.alarm(0)
        print(json.dumps({"outcome": outcome, "reason": reason}), file=replies, flush=True)


if __name__ == "__main__":
    main()
