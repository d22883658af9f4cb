"""Choosing: bands with their ends, quotas, tokens, mixing, the two rules of R-4B; the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from r4b_core.curate.runner import run_stage
from r4b_core.curate.select import (
    FEW_TRIES,
    GENERAL_REST,
    GENERAL_TWICE,
    NO_ANSWER,
    NO_THINKING,
    OUTSIDE,
    OVER_QUOTA,
    OVER_TOKENS,
    PRESETS,
    UNCLEAR,
    WRONG,
    Band,
    SelectSettings,
    judge,
    select,
    thinking_response,
)
from r4b_core.curate.store import Counts, StageError, record_files
from r4b_core.data.records import Record, read_records, training_response, write_records
from r4b_core.modes import Mode
from tests.curate.raw import published

THOUGHT = "<think>\nhm\n</think>\n<answer>7</answer>"


def scored(i: int, right: int | None = 0, tries: int | None = 4, source: str = "s", **more: Any) -> Record:
    fields = {"answer": "7", "response": THOUGHT, "response_tokens": 10, "images": [b"%d" % i]} | more
    return Record(str(i), source, "Q?", tries=tries, right=right, **fields)


def run(tmp_path: Path, records: list[Record], settings: dict[str, Any], seed: int = 0, name: str = "out") -> Counts:
    """Select from records in files of 7."""
    source = tmp_path / f"in-{name}"
    for start in range(0, len(records), 7):
        write_records(source / f"{start:04d}.parquet", records[start : start + 7])
    return select(
        tmp_path / name,
        source,
        SelectSettings.model_validate(settings),
        seed,
        lambda store, work, advance: run_stage(store, work, 0, advance),
    )


def chosen(folder: Path) -> list[Record]:
    return [record for path in record_files(folder) for record in read_records(path)]


@pytest.mark.parametrize(
    ("band", "held"),
    [
        ("[0, 0]", [0.0]),
        ("[0, 1)", [0.0, 0.25, 0.5, 0.75]),
        ("(0, 1)", [0.25, 0.5, 0.75]),
        ("[0.25,0.75]", [0.25, 0.5, 0.75]),
        ("(.25, 1]", [0.5, 0.75, 1.0]),
    ],
)
def test_a_band_says_of_each_end_whether_it_belongs(band: str, held: list[float]) -> None:
    assert [rate for rate in (0.0, 0.25, 0.5, 0.75, 1.0) if Band.parse(band).holds(rate)] == held


@pytest.mark.parametrize("band", ["0, 1", "[1, 0]", "[0, 2]", "(0.5, 0.5]", "[a, b]", "[-1, 0]", ""])
def test_what_is_no_band_is_refused(band: str) -> None:
    with pytest.raises(ValueError, match="is no band|holds no pass rate"):
        SelectSettings(pass_rate=band)


@pytest.mark.parametrize(
    ("record", "settings", "reason", "mode"),
    [
        (scored(0, 0), PRESETS["mmfr-123k"], "", Mode.THINKING),
        (scored(0, 1), PRESETS["mmfr-123k"], OUTSIDE, None),
        (scored(0, 3), PRESETS["mmfr-586k"], "", Mode.THINKING),
        (scored(0, 4), PRESETS["mmfr-586k"], OUTSIDE, None),
        (scored(0, 0, 3), PRESETS["mmfr-123k"], FEW_TRIES, None),
        (scored(0, 0, 0), PRESETS["mmfr-586k"], FEW_TRIES, None),
        (scored(0, None, None), PRESETS["mmfr-123k"], FEW_TRIES, None),
        (scored(0, response=None), PRESETS["mmfr-123k"], NO_THINKING, None),
        (scored(0, verdict="wrong"), PRESETS["mmfr-123k"], WRONG, None),
        (scored(0, None, None, response=None), {}, "", None),
        (scored(0, 0, 8), {"modes": "r4b", "min_tries": 8}, "", Mode.THINKING),
        (scored(0, 1, 8), {"modes": "r4b", "min_tries": 8}, "", Mode.DIRECT),
        (scored(0, 8, 8, response=None, verdict="wrong"), {"modes": "r4b", "min_tries": 8}, "", Mode.DIRECT),
        (scored(0, 0, 7), {"modes": "r4b", "min_tries": 8}, FEW_TRIES, None),
        (scored(0, 0, 8, response=None), {"modes": "r4b", "min_tries": 8}, NO_THINKING, None),
        (scored(0, 3, 8, answer=" "), {"modes": "r4b", "min_tries": 8}, NO_ANSWER, None),
        (scored(0, 8, 8, provenance={"needs_reasoning": "Yes."}), {"modes": "r4b"}, "", Mode.THINKING),
        (scored(0, 0, 8, provenance={"needs_reasoning": "no"}), {"modes": "r4b"}, "", Mode.DIRECT),
        (scored(0, 0, 8, provenance={"needs_reasoning": "maybe"}), {"modes": "r4b"}, UNCLEAR, None),
        (scored(0, None, None, provenance={"needs_reasoning": "yes"}), {"modes": "r4b"}, "", Mode.THINKING),
    ],
)
def test_what_a_record_says_itself(record: Record, settings: dict[str, Any], reason: str, mode: Mode | None) -> None:
    assert judge(record, SelectSettings(**settings)) == (reason, mode)


@pytest.mark.parametrize(
    ("response", "made"),
    [
        ("<think>hm</think>7", "<think>\nhm</think>7"),
        ("  <think>\n\n hm\n</think>\n7", "<think>\nhm\n</think>\n7"),
        ("<think>\n\n</think>7", None),
        ("<think>hm", None),
        ("hm</think>7", None),
        (None, None),
    ],
)
def test_a_thinking_response_opens_as_its_mode_does(response: str | None, made: str | None) -> None:
    assert thinking_response(response) == made


def test_modes_are_those_that_training_reads(tmp_path: Path) -> None:
    records = [scored(0, 0, 8), scored(1, 5, 8, response=None, finish_reason="stop", response_tokens=500)]
    run(tmp_path, records, {"modes": "r4b", "min_tries": 8})
    thinking, direct = chosen(tmp_path / "out")
    assert (thinking.mode, thinking.response) == ("thinking", THOUGHT)
    assert (direct.mode, direct.response) == ("direct", "<think>\n\n</think>7")
    assert (direct.response_tokens, direct.finish_reason, direct.images) == (None, None, [b"1"])
    for record in (thinking, direct):
        assert record.response is not None
        assert training_response(record.response, record.mode)[1] == record.mode


def test_the_presets(tmp_path: Path) -> None:
    records = [scored(i, i % 5) for i in range(50)] + [scored(99, 0, 2)]
    for preset, rights in (("mmfr-123k", {0}), ("mmfr-586k", {0, 1, 2, 3})):
        counts = run(tmp_path, records, {"preset": preset, **PRESETS[preset]}, name=preset)
        found = chosen(tmp_path / preset)
        assert {record.right for record in found} == rights and len(found) == 10 * len(rights)
        assert counts.dropped == {("s", OUTSIDE): 50 - 10 * len(rights), ("s", FEW_TRIES): 1}
        assert {record.mode for record in found} == {"thinking"}


def test_quotas_by_source(tmp_path: Path) -> None:
    records = [scored(i, source="abc"[i % 3]) for i in range(60)]
    counts = run(tmp_path, records, {"quotas": {"a": 3, "*": 8}})
    assert counts.kept == {"a": 3, "b": 8, "c": 8}
    assert counts.dropped == {("a", OVER_QUOTA): 17, ("b", OVER_QUOTA): 12, ("c", OVER_QUOTA): 12}
    first = [record.key for record in chosen(tmp_path / "out")]
    assert first == sorted(first, key=lambda key: int(key.split("/")[1])), "the order of the input is kept"
    run(tmp_path, records, {"quotas": {"a": 3, "*": 8}}, name="same")
    assert published(tmp_path / "same").keys() == published(tmp_path / "out").keys()
    assert [record.key for record in chosen(tmp_path / "same")] == first
    run(tmp_path, records, {"quotas": {"a": 3, "*": 8}}, seed=1, name="other")
    assert [record.key for record in chosen(tmp_path / "other")] != first


def test_the_choice_does_not_depend_on_partitions_or_order(tmp_path: Path) -> None:
    records = [scored(i) for i in range(40)]
    run(tmp_path, records, {"quotas": {"s": 9}}, name="a")
    run(tmp_path, records[::-1], {"quotas": {"s": 9}}, name="b")
    assert {r.key for r in chosen(tmp_path / "a")} == {r.key for r in chosen(tmp_path / "b")}


def test_a_budget_of_tokens(tmp_path: Path) -> None:
    records = [scored(i, response_tokens=None if i % 2 else 30) for i in range(40)]
    counts = run(tmp_path, records, {"target_tokens": 400})
    tokens = [10 if record.response_tokens is None else 30 for record in chosen(tmp_path / "out")]
    assert len(THOUGHT) == 38 and 370 < sum(tokens) <= 400
    assert counts.dropped == {("s", OVER_TOKENS): 40 - len(tokens)}


def test_general_data_is_mixed_in_by_share_or_count(tmp_path: Path) -> None:
    general = tmp_path / "general"
    write_records(general / "g.parquet", [scored(i, 4, source="easy") for i in range(20)] + [scored(3)])
    records = [scored(i) for i in range(14)]
    base = {"pass_rate": "[0, 0]"}
    counts = run(tmp_path, records, base | {"general": {"folder": str(general), "share": 0.3}}, name="share")
    assert counts.kept == {"s": 14, "easy": 6}
    assert counts.dropped == {("easy", GENERAL_REST): 14, ("s", GENERAL_TWICE): 1}
    counts = run(tmp_path, records, base | {"general": {"folder": str(general), "count": 50}}, name="count")
    assert counts.kept == {"s": 14, "easy": 20}
    with pytest.raises(StageError, match="takes 126 records beside 14 selected ones, .* has 20: lower it"):
        run(tmp_path, records, base | {"general": {"folder": str(general), "share": 0.9}}, name="much")


@pytest.mark.parametrize(
    "general", [{"folder": "x"}, {"share": 0.5}, {"count": 3}, {"folder": "x", "share": 0.5, "count": 3}]
)
def test_general_data_takes_a_folder_and_one_amount(general: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="general"):
        SelectSettings.model_validate({"general": general})


def test_a_quota_is_a_count() -> None:
    with pytest.raises(ValueError, match="a quota is a count"):
        SelectSettings(quotas={"a": -1})


RECORD = st.builds(
    dict,
    tries=st.none() | st.integers(0, 8),
    right=st.none() | st.integers(0, 8),
    source=st.sampled_from("ab"),
    answer=st.none() | st.just("7"),
    response=st.none() | st.just(THOUGHT) | st.text(max_size=5),
    response_tokens=st.none() | st.integers(0, 50),
    verdict=st.none() | st.just("wrong"),
)


@given(
    st.lists(RECORD, max_size=25),
    st.sampled_from(["keep", "thinking", "r4b"]),
    st.none() | st.just("[0, 0.5)"),
    st.none() | st.integers(1, 100),
    st.dictionaries(st.sampled_from("ab*"), st.integers(0, 4)),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_counts_add_up_whatever_the_records_hold(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    modes: str,
    band: str | None,
    tokens: int | None,
    quotas: dict[str, int],
) -> None:
    tmp_path = tmp_path_factory.mktemp("select")
    records = [scored(i, **row) for i, row in enumerate(rows)] or [scored(0)]
    asked = {"modes": modes, "pass_rate": band, "target_tokens": tokens, "quotas": quotas}
    counts = run(tmp_path, records, asked)
    assert counts.read == len(records) == counts.num_kept + counts.dropped.total()
    for record in chosen(tmp_path / "out"):
        assert modes == "keep" or record.mode in ("thinking", "direct")
