"""score: how many of a student's answers are right, of those that could be judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from r4b_core.curate.client import Background
from r4b_core.curate.demo.standin import Fault, Kind, Plan, Rule, Running, serve
from r4b_core.curate.journal import Journal
from r4b_core.curate.score import Score, ScoreSettings, open_score
from r4b_core.curate.wire import ServedModel
from tests.curate.served import plan, records, rules, served


@contextmanager
def scoring(planned: Plan, journal: Path, judge: bool = False, **settings: Any) -> Iterator[tuple[Score, Running]]:
    with serve(planned) as server, Background() as background, Journal(journal) as kept:
        made = ScoreSettings(student=served(server.url), **settings)
        asked: ServedModel | None = served(server.url, "judge") if judge else None
        with open_score(made, background, kept, asked) as stage:
            yield stage, server


def test_pass_rates_are_those_of_the_plan(tmp_path: Path) -> None:
    right, wrong = Kind.RIGHT, Kind.WRONG
    table = rules(
        6,
        n0=Rule(answer="1", kinds=(right,)),
        n1=Rule(answer="2", kinds=(right, wrong)),
        n2=Rule(answer="3", kinds=(wrong,)),
        n3=Rule(answer="4", kinds=(right, wrong, wrong, wrong, Kind.MALFORMED, Kind.EMPTY, right, wrong)),
        n4=Rule(answer="5", kinds=(right, Kind.FILTERED)),
        n5=Rule(answer="6", faults=(Fault.RATE_LIMITED, Fault.DROPPED)),
    )
    with scoring(plan({"stand-in": table}), tmp_path / "journal", k=8) as (stage, server):
        kept = stage(records(6)).kept
        counts = server.counts()["sent"]
    assert [(record.right, record.tries) for record in kept] == [(8, 8), (4, 8), (0, 8), (2, 8), (4, 4), (8, 8)]
    assert [record.pass_rate for record in kept] == [1.0, 0.5, 0.0, 0.25, 1.0, 1.0]
    assert kept[4].provenance["student_missing"] == "4 finish_reason content_filter"
    assert all(f"score/{k}/0/sums/0001" in counts for k in range(8))
    assert counts["score/3/0/sums/0005"] == 3


def test_errors_are_missing_and_not_wrong(tmp_path: Path) -> None:
    table = rules(3, n1=Rule(answer="2", faults=(Fault.REFUSED,), always=True))
    with scoring(plan({"stand-in": table}), tmp_path / "journal") as (stage, _):
        outcome = stage(records(3))
    assert not outcome.dropped
    assert [(record.right, record.tries, record.pass_rate) for record in outcome.kept] == [
        (4, 4, 1.0),
        (0, 0, None),
        (4, 4, 1.0),
    ]
    assert outcome.kept[1].provenance["student_missing"] == "4 request refused"


@pytest.mark.parametrize(("truncated", "tries", "note"), [("wrong", 4, None), ("missing", 2, "2 truncated")])
def test_what_a_truncated_rollout_counts_as(tmp_path: Path, truncated: str, tries: int, note: str | None) -> None:
    table = rules(1, n0=Rule(answer="1", kinds=(Kind.RIGHT, Kind.TRUNCATED)))
    with scoring(plan({"stand-in": table}), tmp_path / "journal", truncated=truncated) as (stage, _):
        record = stage(records(1)).kept[0]
    assert (record.right, record.tries, record.provenance.get("student_missing")) == (2, tries, note)


def test_nothing_is_asked_that_cannot_be_judged(tmp_path: Path) -> None:
    rows = records(2)
    rows[1].answer = None
    with scoring(plan(), tmp_path / "journal", k=2) as (stage, server):
        kept = stage(rows).kept
        assert len(server.counts()["sent"]) == 2
    assert (kept[1].tries, kept[1].right, kept[1].pass_rate) == (0, 0, None)
    assert kept[1].provenance["student_missing"] == "no reference answer"


PROSE = "a house with a red roof"


@pytest.mark.parametrize("judge", [False, True])
def test_undecided_is_missing_unless_a_judge_decides(tmp_path: Path, judge: bool) -> None:
    rows = records(3)
    for row in rows:
        row.answer = PROSE
    said = Rule(text="<think>\nlook\n</think>\n\n<answer>there is a house, its roof is red</answer>")
    verdicts = {
        "sums/0000": Rule(text="Both tell of it.\nJUDGEMENT: EQUIVALENT"),
        "sums/0001": Rule(text="One is missing.\nJUDGEMENT: DIFFERENT"),
        "sums/0002": Rule(faults=(Fault.REFUSED,), always=True),
    }
    models = {"stand-in": {row.key: said for row in rows}, "judge": verdicts}
    with scoring(plan(models), tmp_path / "journal", judge, k=2) as (stage, server):
        kept = stage(rows).kept
        asked = sum(times for name, times in server.counts()["sent"].items() if name.startswith("judge/"))
    expected = [(2, 2), (0, 2), (0, 0)] if judge else [(0, 0)] * 3
    assert [(record.right, record.tries) for record in kept] == expected
    assert kept[2].provenance["student_missing"] == "2 undecided"
    assert asked == (3 if judge else 0)  # both rollouts say the same


def test_several_answers_are_undecided(tmp_path: Path) -> None:
    table = rules(1, n0=Rule(text="<think>\nso\n</think>\n\n<answer>1</answer> or <answer>2</answer>"))
    with scoring(plan({"stand-in": table}), tmp_path / "journal", k=2) as (stage, _):
        record = stage(records(1)).kept[0]
    assert (record.right, record.tries, record.provenance["student_missing"]) == (0, 0, "2 undecided")


def test_a_student_without_reasoning_is_judged_by_all_it_says(tmp_path: Path) -> None:
    table = rules(2, n0=Rule(text="It is <answer>1</answer>"), n1=Rule(text="\\boxed{3}"))
    with scoring(plan({"stand-in": table}), tmp_path / "journal", k=1) as (stage, _):
        assert [record.right for record in stage(records(2)).kept] == [1, 0]


def test_no_two_rollouts_share_a_seed_or_a_text(tmp_path: Path) -> None:
    with scoring(plan(), tmp_path / "journal", k=8) as (stage, _):
        stage(records(3))
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len({line.partition('"seed":')[2].partition(",")[0] for line in lines}) == 24
    assert len({line.partition('"text":')[2] for line in lines}) == 24
