"""Prompts by pass rate: who is drawn how often, what a group of rollouts changes, and exact memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from r4b_core.config.recipe import Band, BpoConfig, DataConfig, ModelConfig
from r4b_core.data.files import RecordFiles
from r4b_core.data.prompts import MAX_REST, Prompt, Prompts, PromptSampler, choose
from r4b_core.data.records import write_records
from r4b_core.data.stream import Bad
from r4b_core.models.processor import processor_of
from tests.stages.record_files import SHAPES, make_records, write_processor

RATES = np.array([0.0, 0.1, 0.2, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0, np.nan, np.nan, np.nan])
BANDS = {"[0,0.25)": 0.5, "[0.25,1)": 0.25, "unknown": 0.25}
MEMBERS = {"[0,0.25)": {0, 1, 2}, "[0.25,1)": {3, 4, 5, 6}, "unknown": {9, 10, 11}}


def sampler(bands: dict[str, float] | None = None, seed: int = 0, rate_update: float = 0.5) -> PromptSampler:
    return PromptSampler(RATES, BANDS if bands is None else bands, seed, rate_update)


def test_every_step_has_the_shares_that_were_asked_for() -> None:
    mine = sampler()
    for step in range(6):
        drawn = mine.draw(4, step)
        assert len(set(drawn)) == 4
        counts = {name: len(members & set(drawn)) for name, members in MEMBERS.items()}
        assert counts == {"[0,0.25)": 2, "[0.25,1)": 1, "unknown": 1}


def test_shares_that_do_not_divide_are_kept_on_average() -> None:
    mine = sampler({"[0,0.25)": 1, "[0.25,1]": 2})
    counts = Counter(place in MEMBERS["[0,0.25)"] for step in range(300) for place in mine.draw(2, step))
    assert counts[True] / counts.total() == pytest.approx(1 / 3, abs=0.03)


def test_without_bands_all_are_drawn_before_one_is_drawn_again() -> None:
    mine = sampler({})
    rounds = [sorted(place for step in range(3) for place in mine.draw(4, 3 * number + step)) for number in range(4)]
    assert rounds == [list(range(12))] * 4
    orders = {tuple(sampler({}, seed).draw(12, 0)) for seed in range(5)}
    assert len(orders) == 5


def test_what_a_band_lacks_comes_from_the_others_and_never_from_outside() -> None:
    mine = sampler({"[0,0.25)": 1, "[0.75,0.75]": 1})
    assert set(mine.draw(4, 0)) == {0, 1, 2, 6}
    assert sorted(mine.draw(9, 1)) == [0, 1, 2, 6]
    assert mine.draw(2, 2, without=[0, 1, 2, 6]) == []


def test_a_group_moves_its_prompts_rate_and_with_it_its_band() -> None:
    mine = sampler()
    mine.learn(0, right=1.0, has_signal=False)
    mine.learn(9, right=0.25, has_signal=True)
    mine.learn(7, right=0.5, has_signal=True)
    assert (mine.rate(0), mine.rate(9), mine.rate(7), mine.rate(10)) == (0.5, 0.25, 0.75, None)
    drawn = {place for step in range(20) for place in mine.draw(4, step)}
    assert 7 in drawn and 8 not in drawn


def test_prompts_that_teach_nothing_rest() -> None:
    mine = sampler({})
    counts: Counter[int] = Counter()
    for step in range(120):
        for place in mine.draw(2, step):
            counts[place] += 1
            mine.learn(place, right=0.5, has_signal=place != 3)
    others = [count for place, count in counts.items() if place != 3]
    assert max(others) - min(others) <= 1
    assert 0 < counts[3] <= min(others) / MAX_REST + 2


def test_a_dropped_prompt_is_never_drawn_again() -> None:
    mine = sampler({})
    mine.drop(5)
    assert 5 not in {place for step in range(20) for place in mine.draw(6, step)}


def test_what_is_saved_is_all_there_is() -> None:
    first, second = sampler(), sampler()
    for step in range(5):
        for place in first.draw(4, step):
            first.learn(place, right=(place % 3) / 3, has_signal=place % 3 == 1)
    first.drop(4)
    second.restore(json.loads(json.dumps(first.state)))
    assert second.state == first.state
    assert [second.draw(4, step) for step in range(5, 15)] == [first.draw(4, step) for step in range(5, 15)]


@pytest.mark.parametrize("band", ["[0.3,0.4]", "(0.75,1)"])
def test_a_band_without_prompts_is_refused(band: str) -> None:
    with pytest.raises(ValueError, match=r"bpo\.bands: data\.train has no prompt in .* 3 have no pass rate"):
        sampler({band: 1.0, "[0,1]": 1.0})


@pytest.mark.parametrize("text", ["0-1", "[0,1", "[0.5,0.2]", "(0.5,0.5]", "[a,b]"])
def test_a_band_is_an_interval(text: str) -> None:
    with pytest.raises(ValueError, match="is no band|holds no pass rate"):
        Band.parse(text)


def test_shares_are_not_negative_and_not_all_zero() -> None:
    for bands, words in (({"[0,1]": -1}, "not negative"), ({"[0,1]": 0}, "all shares are 0")):
        with pytest.raises(ValueError, match=words):
            BpoConfig.model_validate({"bands": bands})


def test_prompts_are_read_at_any_place(tmp_path: Path) -> None:
    records = make_records(30)
    records[7].answer, records[8].images, records[9].question = None, [b"x"], "long " * 99
    write_records(tmp_path / "a.parquet", records[:20], row_group=6)
    write_records(tmp_path / "b.parquet", records[20:], row_group=6)
    model = ModelConfig(
        family="qwen3_vl", shape=SHAPES["qwen3_vl"], processor=str(write_processor(tmp_path / "p", "qwen3_vl"))
    )
    files = RecordFiles([f"{tmp_path}/*.parquet"], "data.train")
    prompts = Prompts(files, processor_of(model, DataConfig(task="records")), room=300)
    found = prompts.read([29, 7, 0, 8, 20, 9, 5])
    keys = [prompt.id if isinstance(prompt, Bad) else prompt.sample.id for prompt in found]
    assert keys == [records[place].key for place in (29, 7, 0, 8, 20, 9, 5)]
    assert [prompt.reason for prompt in found if isinstance(prompt, Bad)] == [
        "question cannot be used",
        "image cannot be used",
        "longer than the packing capacity",
    ]
    first = found[0]
    assert isinstance(first, Prompt) and first.sample.response is None and first.encoded.num_tokens <= 300
    assert prompts.rates().tolist() == [number % 5 / 4 for number in range(30)]


def test_the_same_places_are_chosen_again() -> None:
    assert choose(5, 100, 1) == choose(5, 100, 1) != choose(5, 100, 2)
    assert choose(9, 4, 0) == [0, 1, 2, 3]
