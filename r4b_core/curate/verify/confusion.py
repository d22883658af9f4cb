"""How often is the verifier right? Precision and recall on labelled pairs, beside two ways that others decide.

    python -m r4b_core.curate.verify.confusion

``confusions.jsonl`` holds one pair per line: ``gold``, ``answer`` (as extracted) or ``response`` (to extract it from),
``question`` where there are options, ``label`` (right, wrong, or undecidable without knowing more), ``family`` and
``why``. ``repeat`` says how often an answer is to be repeated, for those of megabytes. The labels were set by hand
before any verdict was seen, and are the truth: where the rules disagree, the rules count as mistaken. (Two of them
contradicted each other, 50% for 50 and 6% for 6 without a question; both became undecidable.) The family ``unseen`` was
labelled last, and no rule has changed since.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r4b_core.rewards.answer import find_answer
from r4b_core.rewards.choices import read_options
from r4b_core.rewards.verdict import Outcome, Verdict, undecided
from r4b_core.rewards.verify import Verifier

CONFUSIONS = Path(__file__).with_name("confusions.jsonl")
ADVERSARIAL = "adversarial"


@dataclass(frozen=True)
class Confusion:
    """One labelled pair."""

    id: str
    family: str
    label: str
    gold: str
    answer: str | None = None
    response: str | None = None
    question: str = ""
    repeat: int = 1
    why: str = ""

    @property
    def text(self) -> str:
        """The answer, repeated, or the whole response."""
        return self.response if self.answer is None and self.response is not None else (self.answer or "") * self.repeat


@dataclass
class Tally:
    """Verdicts by label."""

    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)

    def share(self, over: int, under: int) -> float:
        return over / under if under else 1.0

    def of(self, label: str) -> int:
        return sum(count for (each, _), count in self.counts.items() if each == label)

    def called(self, outcome: Outcome) -> int:
        return sum(count for (_, each), count in self.counts.items() if each == outcome)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def precision(self) -> float:
        """Of those called right, the share that are."""
        return self.share(self.counts["right", Outcome.RIGHT], self.called(Outcome.RIGHT))

    @property
    def recall(self) -> float:
        """Of those that are right, the share called so."""
        return self.share(self.counts["right", Outcome.RIGHT], self.of("right"))

    @property
    def wrong_precision(self) -> float:
        """Of those called wrong, the share that are not right."""
        called = self.called(Outcome.WRONG)
        return self.share(called - self.counts["right", Outcome.WRONG], called)

    @property
    def undecided(self) -> float:
        return self.share(self.called(Outcome.UNDECIDED), self.total)

    @property
    def false_rights(self) -> int:
        return self.called(Outcome.RIGHT) - self.counts["right", Outcome.RIGHT]


def load_confusions(path: Path = CONFUSIONS) -> list[Confusion]:
    return [Confusion(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def by_rules(pairs: Sequence[Confusion], verifier: Verifier) -> list[Verdict]:
    """Our verdicts, as the stage gives them."""
    answers = [
        find_answer(pair.text, read_options(pair.question)) if pair.response is not None else None for pair in pairs
    ]
    texts = [pair.text if found is None else found.answer for pair, found in zip(pairs, answers, strict=True)]
    verdicts = verifier.verify_many(
        [(text or "", pair.gold) for text, pair in zip(texts, pairs, strict=True)], [pair.question for pair in pairs]
    )
    return [
        undecided(found.reason) if found is not None and found.answer is None else verdict
        for found, verdict in zip(answers, verdicts, strict=True)
    ]


def by_substring(pair: Confusion) -> Outcome:
    """The published pipeline's rule where no judge answers: either text within the other, capitals aside."""
    answer, gold = pair.text.strip().lower(), pair.gold.strip().lower()
    return Outcome.RIGHT if gold in answer or answer in gold else Outcome.WRONG


def by_math_verify(pairs: Sequence[Confusion], verifier: Verifier) -> list[Verdict]:
    """math-verify alone, in the same killable processes; megabytes are cut off so that it answers at all."""
    return verifier.in_workers([(pair.text[:2000], pair.gold) for pair in pairs])


def tally(pairs: Sequence[Confusion], outcomes: Sequence[Outcome]) -> Tally:
    return Tally(Counter((pair.label, outcome) for pair, outcome in zip(pairs, outcomes, strict=True)))


def confusion_report(workers: int = 2) -> str:
    """Tables as text: the three ways side by side, ours by family, and every pair that ours gets wrong."""
    pairs = load_confusions()
    ways: dict[str, Callable[[], list[Outcome]]] = {}
    with Verifier(workers=workers, timeout_s=3.0) as verifier:
        ways["r4b"] = lambda: [verdict.outcome for verdict in by_rules(pairs, verifier)]
        ways["math-verify alone"] = lambda: [verdict.outcome for verdict in by_math_verify(pairs, verifier)]
        ways["substring match"] = lambda: [by_substring(pair) for pair in pairs]
        outcomes, seconds = {}, {}
        for name, way in ways.items():
            start = time.perf_counter()
            outcomes[name] = way()
            seconds[name] = time.perf_counter() - start
        verdicts = by_rules(pairs, verifier)
    lines = [
        f"{len(pairs)} labelled pairs, {sum(pair.family == ADVERSARIAL for pair in pairs)} of them adversarial",
        "",
    ]
    lines.append(f"{'':20}{'precision':>10}{'recall':>9}{'undecided':>11}{'false right':>13}{'seconds':>9}")
    for name in ways:
        each = tally(pairs, outcomes[name])
        lines.append(
            f"{name:20}{each.precision:10.4f}{each.recall:9.4f}{each.undecided:11.3f}{each.false_rights:13d}"
            f"{seconds[name]:9.1f}"
        )
    lines += ["", f"{'family':20}{'pairs':>7}{'precision':>11}{'recall':>9}{'undecided':>11}{'wrong is wrong':>16}"]
    for family in dict.fromkeys(pair.family for pair in pairs):
        chosen = [index for index, pair in enumerate(pairs) if pair.family == family]
        each = tally([pairs[index] for index in chosen], [outcomes["r4b"][index] for index in chosen])
        lines.append(
            f"{family:20}{each.total:7d}{each.precision:11.4f}{each.recall:9.4f}{each.undecided:11.3f}"
            f"{each.wrong_precision:16.4f}"
        )
    lines += ["", "mistaken or missed by r4b:"]
    lines += [
        _mistake(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if _mistaken(pair, verdict)
    ]
    return "\n".join(lines)


def _mistaken(pair: Confusion, verdict: Verdict) -> bool:
    return (pair.label == "right") != (verdict.outcome is Outcome.RIGHT)


def _mistake(pair: Confusion, verdict: Verdict) -> str:
    said = f"called {verdict.outcome}: {verdict.reason}"
    return f"  {pair.id}: {pair.text[:60]!r} for {pair.gold[:60]!r} is {pair.label}, {said}"


if __name__ == "__main__":
    print(confusion_report())
