"""The cost model against published numbers, and the documented table against the cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from r4b_core.plan import machine
from tests.plan.published import AUTOMODEL, BRIDGE, EASYR1, LMMS, MISSED, TITAN, TITAN_H200, WITHIN, Row, table

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", WITHIN, ids=lambda row: f"{row.source[1:9]}, {row.setting}, {row.unit}")
def test_within_a_fifth_of_what_was_published(row: Row) -> None:
    assert 0.8 <= row.ratio() <= 1.2


def test_rows_of_every_trainer_that_publishes() -> None:
    assert {row.source for row in WITHIN} == {TITAN, TITAN_H200, BRIDGE, AUTOMODEL, EASYR1, LMMS}


@pytest.mark.parametrize("row", MISSED, ids=lambda row: f"{row.source[1:9]}, {row.setting}, {row.unit}")
def test_a_row_called_missed_is_missed(row: Row) -> None:
    assert not 0.8 <= row.ratio() <= 1.2
    assert row.note in DOCS


def test_the_documented_tables_are_these() -> None:
    assert table(WITHIN) in DOCS
    assert table(MISSED) in DOCS


def test_every_constant_is_documented_with_its_value() -> None:
    constants = {name: value for name, value in vars(machine).items() if name.isupper() and isinstance(value, float)}
    assert len(constants) >= 10
    for name, value in constants.items():
        assert f"| `{name}` | {value:g} |" in DOCS, name


def test_speed_ratios_do_not_lean_one_way() -> None:
    """Constants that were too kind or too harsh all over would show in the mean."""
    ratios = [row.ratio() for row in WITHIN if row.unit != "GiB"]
    assert 0.93 <= sum(ratios) / len(ratios) <= 1.07
