"""The data demo: every planted fault is found by the stage that has to, and what is left can be trained on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from r4b_core.config.load import load_recipe
from r4b_core.curate.demo.corpus import COUNTS, Fate, build
from r4b_core.curate.demo.plan import expected
from r4b_core.curate.demo.run import DemoResult, run_demo
from r4b_core.curate.recipe import STAGES
from r4b_core.curate.store import record_files
from r4b_core.data.records import read_records, to_sample
from r4b_core.models.processor import processor_of

pytest.importorskip("skimage", reason="the demo's pictures come with scikit-image")
SHARE = 0.06


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    run = tmp_path_factory.mktemp("demo") / "small"
    return run, run_demo(run, share=SHARE)


def test_the_funnel_is_the_planned_one(demo: tuple[Path, DemoResult]) -> None:
    run, result = demo
    assert result.differences == []
    assert result.requests["sent"] > result.requests["finished"] > 0  # servers failed, and were asked again
    assert result.page == run / "stats.html" and result.page.stat().st_size > 10_000


def test_a_difference_would_be_told(demo: tuple[Path, DemoResult]) -> None:
    """One row with another fate is enough."""
    run, _ = demo
    items = build(run.parent / "again", share=SHARE).items
    place = next(i for i, item in enumerate(items) if item.fate is Fate.WRONG)
    changed = [*items[:place], replace(items[place], fate=Fate.SOLVED_0), *items[place + 1 :]]
    planned, other = expected(items, STAGES), expected(changed, STAGES)
    assert planned["standardize"] == other["standardize"]
    assert planned["verify"] != other["verify"] and planned["select"] != other["select"]


def test_started_again_nothing_is_asked_again(demo: tuple[Path, DemoResult]) -> None:
    run, result = demo
    again = run_demo(run, share=SHARE)
    assert again.requests == {"sent": 0, "finished": 0} and again.differences == []


def test_what_is_left_can_be_trained_on(demo: tuple[Path, DemoResult]) -> None:
    run, result = demo
    recipe = load_recipe(result.train).recipe
    processor = processor_of(recipe.model, recipe.data)
    modes: Counter[str | None] = Counter()
    for path in record_files(run / "5-select"):
        for record in read_records(path):
            assert processor.encode_prompt(to_sample(record)).num_tokens > 0
            assert record.pass_rate is not None and record.pass_rate < 1
            modes[record.mode] += 1
    assert set(modes) == {"thinking", "direct"}
    tokenizer = processor.tokenizer
    text = "<think>\n\n</think>3<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("\n") == [tokenizer.mode_tokens.newline]


def test_rows_are_the_same_every_time_and_all_fates_are_there(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a", share=SHARE), build(tmp_path / "b", share=SHARE)
    assert first.items == second.items
    assert {item.fate for item in first.items} == set(Fate)
    assert sum(sum(counts) for counts in COUNTS.values()) == 2000
    assert json.loads(first.benchmark.read_text().splitlines()[0])["question"].startswith("Benchmark item")
