"""Records per second of verify by rules, beside math-verify alone, on answers as they are in practice.

    r4b bench data verify

The mix is that of the short answers of MMFineReason-123K (17% one letter, 27% a plain number, 60% with a digit, 71% of
at most 12 characters); a quarter of the answers is wrong. ``answers`` compares (answer, reference) pairs, ``records``
runs the whole stage on records with responses of 14,000 characters: template, length, 50-gram repetition, extraction
and comparison. What the rules leave to math-verify is part of both. Every pair is different, so that nothing is
remembered. The rival is math-verify in this very process, parsing both sides with its own time limits off.

Records per second of one core, processor time of the stage and of its verifier process together, 2026-11-20, AMD EPYC,
2 cores shared with other jobs, Python 3.11, math-verify 0.9.0, sympy 1.14.0, commit 6abd730; medians of 5:

=======  ==============  ===========
case     ours            math-verify
=======  ==============  ===========
answers  7547 (57x)      133
records  2381 (17x)      140
=======  ==============  ===========

Both cases scale with the processes of the stage, so two cores do 4,700 records per second.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from math_verify import parse, verify

from r4b_core.curate.verify.stage import VerifySettings, verify_batch
from r4b_core.data.records import Record
from r4b_core.rewards.rules import compare
from r4b_core.rewards.verify import Verifier

TURNS = 5
PAIRS = 4000
RECORDS = 500
RIVAL_PAIRS = 200
Pair = tuple[str, str, str]

_OPTIONS = "Which holds?\nA. red\nB. blue\nC. green\nD. none of these"
_WORDS = (
    "parallel lines", "an isosceles triangle", "photosynthesis", "the right atrium", "Increasing", "yes", "no",
    "Figure B", "It doubles", "sodium chloride",
)  # fmt: skip


def pairs(count: int, seed: int) -> list[Pair]:
    """(answer, reference, question), shuffled."""
    draw = random.Random(seed)
    made = [_pair(draw) for _ in range(count)]
    return [(answer if draw.random() < 0.75 else other, gold, question) for answer, other, gold, question in made]


def _pair(draw: random.Random) -> tuple[str, str, str, str]:
    """(right answer, wrong answer, reference, question)."""
    kind = draw.random()
    n, m, k = draw.randint(1, 9999), draw.randint(2, 97), draw.randint(2, 49)
    if kind < 0.17:
        gold, other = draw.sample("ABCD", 2)
        return draw.choice((gold, f"({gold})", f"{gold}.")), other, gold, _OPTIONS
    if kind < 0.44:
        gold = draw.choice((str(n), str(-n), f"{n / 100:.2f}"))
        return draw.choice((gold, f"${gold}$", f"{gold}.0" if "." not in gold else gold)), str(n + m), gold, "How many?"
    if kind < 0.77:
        forms = (
            (f"{n} cm", f"{n}\\text{{ cm}}", f"{n} m"),
            (f"{m}\\pi", f"{m} \\pi", f"{m + 1}\\pi"),
            (f"\\frac{{{m}}}{{{k}}}", f"{m}/{k}", f"\\frac{{{k}}}{{{m + k}}}"),
            (f"{m}^\\circ", f"{m}°", f"{k + 100}°"),
            (f"{m}\\sqrt{{{k}}}", f"{m} \\sqrt{{{k}}}", f"{k}\\sqrt{{{m + 1}}}+1"),
            (f"({m}, {k})", f"({m},{k})", f"({k + 1}, {m})"),
            (f"x = {m}", str(m), f"x = {m + k}"),
            (f"y = {m}x + {k}", f"y={k}+{m}x", f"y={m}x-{k}"),
            (f"{m}%", f"{m}\\%", f"{m + 1}%"),
            (f"[{m}, \\infty)", f"x \\ge {m}", f"({m}, \\infty)"),
            (f"{m}:{k}", f"{m} : {k}", f"{k}:{m + k}"),
            (f"\\log_{{{k}}}{{{m}}}", f"\\frac{{\\ln {m}}}{{\\ln {k}}}", f"\\log_{{{m}}}{{{m + k}}}"),
        )
        weights = [9] * (len(forms) - 1) + [1]
        gold, answer, other = draw.choices(forms, weights)[0]
        return answer, other, gold, "What is the value?"
    gold, other = draw.sample(_WORDS, 2)
    return draw.choice((gold, gold.upper(), f"{gold}.")), other, f"{gold} {n}" if kind > 0.97 else gold, "Name it."


def records(count: int, seed: int) -> list[Record]:
    """Records whose responses are as long as real ones."""
    draw = random.Random(seed)
    vocabulary = [
        f"{word}{number}" for word in ("angle", "so", "length", "therefore", "point") for number in range(400)
    ]
    made = []
    for index, (answer, gold, question) in enumerate(pairs(count, seed)):
        reasoning, solution = (" ".join(draw.choices(vocabulary, k=words)) for words in (1250, 400))
        response = f"<think>{reasoning}</think>{solution}\n<answer>{answer}</answer>"
        made.append(Record(str(index), "MMR1", question, answer=gold, response=response, finish_reason="stop"))
    return made


def by_math_verify(answer: str, gold: str) -> bool:
    expected, found = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(expected, found, timeout_seconds=None))


def processor_seconds() -> float:
    """Of this process and the verifier's."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def publish(name: str, benchmark: Any, ours: Callable[[], int], theirs: Callable[[], int]) -> None:
    """Take both in turns; each call says how many records it did."""
    sides = {"ours": ours, "math-verify": theirs}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    walls: list[float] = []
    for _ in range(TURNS):
        for side, call in sides.items():
            start, wall = processor_seconds(), time.perf_counter()
            count = call()
            rates[side].append(count / (processor_seconds() - start))
            if side == "ours":
                walls.append(count / (time.perf_counter() - wall))
    rate = {side: statistics.median(each) for side, each in rates.items()}
    benchmark.pedantic(ours, rounds=1)
    benchmark.extra_info.update(
        ours=1 / rate["ours"],
        rivals={"math-verify": 1 / rate["math-verify"]},
        clock="processor time, of the verifier's process too",
        records_per_core_second=rate,
        records_per_second_by_wall=statistics.median(walls),
    )
    shown = ", ".join(f"{side} {each:.0f}" for side, each in rate.items())
    print(f"\n{name}: records/s per core {shown}; ours {statistics.median(walls):.0f} by wall time")


def fresh(count: int) -> Iterator[list[Pair]]:
    """Another set of pairs each time, so that caches hold nothing of the next."""
    seed = 0
    while True:
        seed += 1
        yield pairs(count, seed)


def rival(batches: Iterator[list[Pair]]) -> int:
    for answer, gold, _ in next(batches):
        by_math_verify(answer, gold)
    return RIVAL_PAIRS


def test_answers(benchmark: Any) -> None:
    ours, theirs = fresh(PAIRS), fresh(RIVAL_PAIRS)
    sets = [next(ours) for _ in range(TURNS + 2)]
    left = sum(compare(*pair) is None for pair in sets[0])
    assert left <= 0.05 * PAIRS
    with Verifier(workers=1) as verifier:
        verifier.verify("\\sin(\\pi/6)", "0.5")  # starts the process

        def call() -> int:
            batch = sets.pop()
            verifier.verify_many([pair[:2] for pair in batch], [pair[2] for pair in batch])
            return PAIRS

        publish("answers", benchmark, call, lambda: rival(theirs))
    benchmark.extra_info["left_to_math_verify"] = left / PAIRS


def test_records(benchmark: Any) -> None:
    theirs = fresh(RIVAL_PAIRS)
    settings = VerifySettings()
    sets = [records(RECORDS, seed) for seed in range(TURNS + 1)]
    with Verifier(workers=1) as verifier:
        verifier.verify("\\sin(\\pi/6)", "0.5")

        def call() -> int:
            outcome = verify_batch(sets.pop(), settings, verifier)
            assert len(outcome.kept) + len(outcome.dropped) == RECORDS
            return RECORDS

        publish("records", benchmark, call, lambda: rival(theirs))
