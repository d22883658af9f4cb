"""What stages ask about their data: too many bad records, and errors on which all ranks agree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from r4b_core.data.stream import Bad
from r4b_core.stages.source import Tally, agreed

BAD = Bad("s/1", "image cannot be used", "no image")


def test_too_many_bad_records_among_the_first_end_the_run() -> None:
    tally = Tally(0.2, records=100_000)
    tally.add(300, [BAD] * 150)
    tally.add(300, [BAD] * 50)
    with pytest.raises(ValueError, match=r"201 of the first 610 records cannot be used .* = 0\.2 of 1000"):
        tally.add(10, [BAD])


def test_after_the_first_thousand_bad_records_are_only_counted() -> None:
    tally = Tally(0.2, records=100_000)
    tally.add(1000, [BAD] * 100)
    again = Tally(0.2, records=100_000)
    again.restore(tally.state)
    again.add(5000, [BAD] * 4000)
    assert again.total == 4100


def test_of_few_records_the_share_is_of_them() -> None:
    with pytest.raises(ValueError, match="3 of the first 10 records"):
        Tally(0.2, records=10).add(10, [BAD] * 3)
    Tally(0.3, records=10).add(10, [BAD] * 3)


def ranks(errors: list[str]) -> Any:
    """Two ranks, the other of which says this."""
    return SimpleNamespace(world=2, gather=lambda mine: [*errors, mine])


def fail(kind: type[Exception]) -> Any:
    raise kind("disk gone")


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    assert agreed(ranks([""]), lambda: 5) == 5
    with pytest.raises(ValueError, match="disk gone"):
        agreed(ranks(["disk gone"]), lambda: 5)
    with pytest.raises(ValueError, match="disk gone"):
        agreed(ranks([""]), lambda: fail(OSError))
    with pytest.raises(TypeError, match="disk gone"):
        agreed(ranks([""]), lambda: fail(TypeError))
