"""What the stand-in models say about each row of the demo, and what the stages must therefore find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from r4b_core.curate.demo.corpus import Fate, Item
from r4b_core.curate.demo.standin import Fault, Kind, Plan, Rule
from r4b_core.curate.recipe import StageName
from r4b_core.curate.store import Counts

TEACHER, STUDENT, JUDGE = "stand-in-teacher", "stand-in-student", "stand-in-judge"
TRIES = 4
WORDS = 220  # of a response: above the 200 that verify asks for

# What becomes of a fate: the stage that lets it go and its reason; quarantined where the row itself is bad.
_ENDS: dict[Fate, tuple[StageName, str]] = {
    Fate.BROKEN_IMAGE: ("standardize", "broken image"),
    Fate.MISSING_IMAGE: ("standardize", "missing image"),
    Fate.NULL_QUESTION: ("standardize", "null question"),
    Fate.WRONG_TYPE: ("standardize", "wrong type"),
    Fate.INVALID_UTF8: ("standardize", "invalid UTF-8"),
    Fate.DUPLICATE_ID: ("standardize", "duplicate id"),
    Fate.DUPLICATE: ("standardize", "duplicate"),
    Fate.NEAR_DUPLICATE: ("standardize", "near duplicate"),
    Fate.NO_ANSWER: ("standardize", "no checkable answer"),
    Fate.IN_A_BENCHMARK: ("standardize", "benchmark text"),
    Fate.REFUSED: ("generate", "request refused"),
    Fate.TRUNCATED: ("verify", "response did not end"),
    Fate.REPETITIVE: ("verify", "repetition"),
    Fate.MALFORMED: ("verify", "think tags"),
    Fate.WRONG: ("verify", "wrong answer"),
    Fate.JUDGED_WRONG: ("verify", "wrong answer"),
    Fate.UNCLEAR: ("verify", "undecided"),
    Fate.JUDGED_RIGHT: ("select", "pass rate outside the band"),
    Fate.FEW_TRIES: ("select", "too few judged tries"),
    Fate.SOLVED_4: ("select", "pass rate outside the band"),
}
_QUARANTINED = (
    *(Fate.BROKEN_IMAGE, Fate.MISSING_IMAGE, Fate.NULL_QUESTION, Fate.WRONG_TYPE, Fate.INVALID_UTF8),
    Fate.DUPLICATE_ID,
)
_KINDS = {Fate.TRUNCATED: Kind.TRUNCATED, Fate.REPETITIVE: Kind.REPETITIVE, Fate.MALFORMED: Kind.MALFORMED}

# Every so many rows a server misbehaves, and the row survives because it is asked again.
_TROUBLE: tuple[tuple[int, tuple[Fault, ...]], ...] = (
    (13, (Fault.RATE_LIMITED, Fault.SERVER_ERROR)),
    (17, (Fault.DROPPED,)),
    (19, (Fault.HALF,)),
    (53, (Fault.SLOW,)),
    (59, (Fault.NOT_JSON, Fault.RATE_LIMITED)),
)
_REGENERATED = 29


@dataclass
class Expected:
    """What one stage must count."""

    read: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    quarantined: Counter[tuple[str, str]] = field(default_factory=Counter)

    def differences(self, counts: Counts) -> list[str]:
        """Where the counts of a stage are others, in words; none where it found exactly what was planted."""
        found = [] if self.read == counts.read else [f"in: {counts.read}, planned {self.read}"]
        for what in ("kept", "dropped", "quarantined"):
            planned, seen = getattr(self, what), getattr(counts, what)
            for key in sorted({*planned, *seen}):
                if planned[key] != seen[key]:
                    name = key if isinstance(key, str) else ", ".join(key)
                    found.append(f"{what} {name}: {seen[key]}, planned {planned[key]}")
        return found


def expected(items: Sequence[Item], stages: Sequence[StageName]) -> dict[StageName, Expected]:
    """The funnel that the fates of all rows add up to."""
    left = list(items)
    funnel = {}
    for stage in stages:
        plan = funnel[stage] = Expected(read=len(left))
        going = {fate: reason for fate, (where, reason) in _ENDS.items() if where == stage}
        for item in left:
            if item.fate not in going:
                plan.kept[item.source] += 1
            elif item.fate in _QUARANTINED:
                plan.quarantined[item.source, going[item.fate]] += 1
            else:
                plan.dropped[item.source, going[item.fate]] += 1
        left = [item for item in left if item.fate not in going]
    return funnel


def stand_in_plan(items: Sequence[Item]) -> Plan:
    """How teacher, student and judge answer: right but for what was planted, and with every trouble a server makes."""
    asked = [item for item in items if item.fate is not Fate.DUPLICATE_ID]
    return Plan(
        models={
            TEACHER: {item.key: _teacher(place, item) for place, item in enumerate(asked)},
            STUDENT: {item.key: _student(place, item) for place, item in enumerate(asked)},
            JUDGE: {item.key: _judge(item) for item in asked},
        },
        slow_s=0.3,
        retry_after=0.05,
        words=WORDS,
    )


def _teacher(place: int, item: Item) -> Rule:
    if item.fate is Fate.REFUSED:
        return Rule(faults=(Fault.REFUSED,), always=True)
    kind = _KINDS.get(item.fate, Kind.WRONG if item.fate in (Fate.WRONG, Fate.JUDGED_WRONG) else Kind.RIGHT)
    if kind is Kind.RIGHT and place % _REGENERATED == 0:
        return Rule(item.said, item.wrong, (Kind.TRUNCATED,), heals_after=1, faults=_faults(place))
    rule = Rule(item.said, item.wrong, (kind,), faults=_faults(place))
    return rule


def _student(place: int, item: Item) -> Rule:
    if item.fate is Fate.FEW_TRIES:
        return Rule(item.answer, item.wrong, (Kind.RIGHT, Kind.FILTERED, Kind.WRONG, Kind.FILTERED))
    right = item.fate.solved if item.fate.solved is not None else TRIES
    kinds = (Kind.RIGHT,) * right + (Kind.WRONG,) * (TRIES - right)
    # A prose answer in other words: nobody but the judge can tell, and it says of all four that they are right.
    said = item.said if item.fate is Fate.JUDGED_RIGHT else item.answer
    return Rule(said, item.wrong, kinds, faults=_faults(place))


def _judge(item: Item) -> Rule:
    verdict = {Fate.JUDGED_RIGHT: "EQUIVALENT", Fate.JUDGED_WRONG: "DIFFERENT"}.get(item.fate)
    if verdict is None:
        return Rule(text="Both answers speak of the picture. It is hard to tell whether they mean the same.")
    return Rule(text=f"Both answers say why something stands out.\nJUDGEMENT: {verdict}")


def _faults(place: int) -> tuple[Fault, ...]:
    return next((faults for every, faults in _TROUBLE if place % every == every - 1), ())
