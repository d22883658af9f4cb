from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r4b_core.rewards import verify as verify_module
from r4b_core.rewards.rules import compare
from r4b_core.rewards.verify import Outcome, Verifier

HANGS = "\\cos(9^{9^{9^9}})"
SINE = ("\\sin(\\pi/6)", "0.5")


def cosines(numerators: range, gold: int = 3) -> list[tuple[str, str]]:
    """Pairs that only math-verify can compare; the one whose numerator is ``gold`` is right."""
    return [(f"\\cos({k}/7)+1", f"1+\\cos({gold}/7)") for k in numerators]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout_s=5.0) as verifier:
        yield verifier


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("answer", "gold", "outcome"),
    [
        ("7", "7", "right"),
        ("1", "10", "wrong"),
        ("10", "1", "wrong"),
        ("01", "1", "right"),
        ("+3", "3", "right"),
        ("-3", "3", "wrong"),
        ("3.0", "3", "right"),
        ("1,000", "1000", "right"),
        (" 7. ", "7", "right"),
        ("$7$", "7", "right"),
        ("1 0", "10", "wrong"),
        ("3 7", "7", "wrong"),
        ("7 or 8", "7", "wrong"),
        ("0 1 2 3 4 5 6 7 8 9", "9", "wrong"),
        ("Blue", "blue", "right"),
        ("dark  blue", "dark blue", "right"),
        ("green", "blue", "wrong"),
        ("not blue", "blue", "wrong"),
        ("B", "B", "right"),
        ("(B)", "B", "right"),
        ("B. the second", "B", "right"),
        ("A) B", "B", "wrong"),
        ("the answer is correct", "yes", "undecided"),
        ("7", "", "undecided"),
        ("", "", "undecided"),
        ("9" * 3000, "7", "undecided"),
    ],
)
def test_plain_answers(answer: str, gold: str, outcome: str) -> None:
    verdict = compare(answer, gold)
    assert verdict is not None and verdict.outcome == outcome and verdict.reason


def test_rules_leave_other_mathematics_alone() -> None:
    assert compare("\\sin(\\pi/6)", "0.5") is None
    assert compare("x^2-1", "(x-1)(x+1)") is not None
    assert compare("\\frac{x^2-1}{x-1}", "x+1") is None


def test_comparison_takes_little_time() -> None:
    started = time.process_time()
    for answer in ("1,111," * 300 + "x", "1 " * 900 + "x", "a " * 900 + "1", "+" * 1900):
        for gold in ("7", "blue", "B"):
            compare(answer, gold)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("answer", "gold", "outcome"),
    [
        ("\\frac{1}{2}", "0.5", "right"),
        ("50%", "0.5", "right"),
        ("2\\frac{1}{2}", "5/2", "right"),
        ("\\{1,2\\}", "\\{2,1\\}", "right"),
        ("(2,1)", "(1,2)", "wrong"),
        ("[0,1)", "[0,1]", "wrong"),
        ("\\sqrt{2}", "2^{1/2}", "right"),
        ("3 cm", "3", "right"),
        ("x=3", "3", "right"),
        ("90^\\circ", "90", "right"),
        ("the value is 7", "7", "right"),
        ("the value is 17", "7", "wrong"),
        ("the answer is correct", "7", "wrong"),
        ("7", "@@@", "undecided"),
        ("7", "\\frac{1}{", "undecided"),
        ("the answer is correct", "\\frac{1}{", "undecided"),
    ],
)
def test_mathematics(verifier: Verifier, answer: str, gold: str, outcome: str) -> None:
    verdict = verifier.verify(answer, gold)
    assert verdict.outcome == outcome, verdict.reason


def test_order_is_kept_and_verdicts_are_counted(verifier: Verifier) -> None:
    before = verifier.counts.copy()
    pairs = cosines(range(8), gold=5) + [("5", "5"), ("6", "5")]
    outcomes = [verdict.outcome is Outcome.RIGHT for verdict in verifier.verify_many(pairs)]
    assert outcomes == [k == 5 for k in range(8)] + [True, False]
    assert verifier.counts - before == {"right": 2, "wrong": 8}


def test_a_hanging_worker_is_killed_and_replaced() -> None:
    with Verifier(workers=1, timeout_s=1.0) as verifier:
        assert verifier.verify(*SINE).outcome is Outcome.RIGHT
        worker = verifier._workers[0]
        assert worker is not None
        pid = worker._process.pid
        started = time.monotonic()
        first, second = verifier.verify_many([(HANGS, "7"), SINE])
        assert time.monotonic() - started < 30
        assert (first.outcome, first.reason) == (Outcome.UNDECIDED, "took more than 1 s to verify")
        assert second.outcome is Outcome.RIGHT
        assert not alive(pid)


def test_other_answers_do_not_wait_for_a_hanging_one() -> None:
    with Verifier(workers=2, timeout_s=2.0) as verifier:
        verifier.verify_many([SINE, ("\\cos(\\pi)", "-1")])
        verdicts = verifier.verify_many([(HANGS, "7")] + cosines(range(6)))
    assert [verdict.outcome for verdict in verdicts] == ["undecided"] + [
        "right" if k == 3 else "wrong" for k in range(6)
    ]


def test_a_worker_that_dies_is_replaced(verifier: Verifier) -> None:
    verifier.verify_many(cosines(range(4)))
    for worker in verifier._workers:
        assert worker is not None
        worker._process.kill()
        worker._process.wait()
    lost = verifier.verify_many([SINE, ("\\cos(\\pi)", "-1")])
    assert {verdict.outcome for verdict in lost} == {Outcome.UNDECIDED}
    assert "died" in lost[0].reason
    assert verifier.verify(*SINE).outcome is Outcome.RIGHT


def test_an_interruption_leaves_no_late_verdict_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(workers=1) as verifier:
        verifier.verify(*SINE)

        def interrupted(self: verify_module._Worker) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(verify_module._Worker, "receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                verifier.verify("\\cos(\\pi)", "-1")
        assert verifier.verify("\\cos(1)", "0.5").outcome is Outcome.WRONG


def test_a_worker_that_never_starts_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(verify_module, "_WORKER", broken)
    with Verifier() as verifier, pytest.raises(RuntimeError, match="ended with (3|-9) before it was ready"):
        verifier.verify(*SINE)


def test_close_ends_the_processes() -> None:
    verifier = Verifier(workers=1)
    verifier.verify(*SINE)
    worker = verifier._workers[0]
    assert worker is not None
    verifier.close()
    assert not alive(worker._process.pid)


def test_deep_nesting_is_survived(verifier: Verifier) -> None:
    verdict = verifier.verify("\\sqrt{" * 150 + "2" + "}" * 150, "7")
    assert verdict.outcome is not Outcome.RIGHT
    assert verifier.verify(*SINE).outcome is Outcome.RIGHT


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce RLIMIT_AS")
def test_memory_is_limited() -> None:
    worker = Path(verify_module.__file__).with_name("worker.py")
    script = (
        f"import runpy; w = runpy.run_path({str(worker)!r}); w['limit_process'](256)\n"
        "try:\n    bytearray(512 * 2**20)\nexcept MemoryError:\n    print('limited')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "limited", done.stderr


def test_without_mathematics_no_process_runs() -> None:
    verifier = Verifier(mathematics=False)
    assert verifier.verify("\\sin(\\pi/6)", "0.5").outcome is Outcome.WRONG
    assert verifier.verify("7", "7").outcome is Outcome.RIGHT
    assert verifier._workers == [None]


@pytest.mark.parametrize("setting", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_mb": 16}])
def test_wrong_settings_are_named(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} = .*: must be at least"):
        Verifier(**setting)
