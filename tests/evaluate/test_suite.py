"""The evaluation: what it asks, what it counts, and what it does with pictures of other questions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest

from r4b_core.config.load import load_recipe
from r4b_core.config.recipe import EvaluateConfig, ParallelConfig
from r4b_core.data.boards import make_samples
from r4b_core.evaluate.run import evaluation_table
from r4b_core.evaluate.suite import FAMILIES, Cell, Evaluation, deal_images, evaluate, table_of
from r4b_core.models.processor import processor_of
from r4b_core.models.r4b.model import build_model
from r4b_core.modes import Mode
from r4b_core.parallel import runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.types import FinishReason, Rollout

MIX = {"read": 1.0, "count": 1.0, "value": 1.0}


@pytest.mark.parametrize("count", [2, 3, 17])
def test_every_question_gets_the_image_of_another_sample(count: int) -> None:
    samples = make_samples("held_out", 0, "test", 0, count, MIX)
    dealt = deal_images(samples)
    assert [(s.id, s.question, s.answer) for s in dealt] == [(s.id, s.question, s.answer) for s in samples]
    owners = [next(i for i, s in enumerate(samples) if s.images[0] is given.images[0]) for given in dealt]
    assert sorted(owners) == list(range(count)) and all(i != owner for i, owner in enumerate(owners))
    assert not any(np.array_equal(a.images[0], b.images[0]) for a, b in zip(samples, dealt, strict=True))


def test_one_item_has_no_other_image() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        EvaluateConfig(items=1)


def rollout(reward: float, length: int, taken: Mode, probability: float) -> Rollout:
    return Rollout(
        tokens=[0] * length,
        logprobs=[0.0] * length,
        entropies=[0.0] * length,
        mode=Mode.AUTO,
        taken=taken,
        forced=0,
        finish=FinishReason.STOP,
        seed=0,
        thinking_probability=probability,
        reward=reward,
    )


def test_a_cell_is_the_mean_over_its_rollouts() -> None:
    rollouts = [rollout(1, 3, Mode.THINKING, 0.9), rollout(0, 6, Mode.DIRECT, 0.2), rollout(1, 9, Mode.AUTO, 0.1)]
    cell = Cell.of(rollouts)
    assert (cell.accuracy, cell.mean_tokens, cell.thinking_rate) == (2 / 3, 6.0, 1 / 3)
    assert cell.thinking_probability == pytest.approx(0.4)


def evaluation() -> Evaluation:
    cells = {
        family: {mode.value: Cell(i / 7, 10.0 * j, 1 / 3, 0.1) for j, mode in enumerate(Mode)}
        for i, family in enumerate(FAMILIES)
    }
    return Evaluation(cells, {family: 0.125 for family in FAMILIES})


def test_the_table_comes_back_from_a_line_of_metrics() -> None:
    made = evaluation()
    line = json.loads(json.dumps({"stage": "bpo", "step": 4, **made.metrics()}))
    assert table_of(line) == made.table()
    assert made.table()["hard"]["direct"] == {"accuracy": 2 / 7, "mean_tokens": 10.0, "thinking_rate": 1 / 3}
    assert set(made.table()) == {"easy", "hard"}
    assert table_of({"stage": "bpo", "step": 4, "loss": 1.0}) is None


def test_the_printed_table_has_every_family_and_mode() -> None:
    table = evaluation_table(evaluation(), "title")
    assert table.row_count == len(FAMILIES) * (3 + 1)
    assert list(table.columns[0].cells) == [family for family in FAMILIES for _ in range(4)]


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple]:
    recipe = load_recipe("smoke", ["evaluate.items=4", "bpo.max_new_tokens=6"]).recipe
    ranks = runtime.start(ParallelConfig(), seed=0)
    model = build_model(recipe.model, recipe.parallel, recipe.seed)
    yield recipe, ranks, processor_of(recipe.model, recipe.data), model
    ranks.stop()


def run(parts: tuple, batch: int) -> Evaluation:
    recipe, ranks, processor, model = parts
    engine = EmbeddedEngine(model, processor.tokenizer.mode_tokens, processor.tokenizer.vocab_size, batch)
    return evaluate(recipe, ranks, processor, engine)


def test_forced_modes_are_forced_and_budgets_kept(parts: tuple) -> None:
    made = run(parts, 16)
    for family in FAMILIES:
        cells = made.cells[family]
        assert cells["direct"].thinking_rate == 0 and cells["thinking"].thinking_rate == 1
        assert len({cell.thinking_probability for cell in cells.values()}) == 1  # the same prompts in every mode
        assert all(1 <= cell.mean_tokens <= 6 for cell in cells.values())
        assert all(cell.accuracy * 4 in range(5) for cell in cells.values())
        assert not math.isnan(made.shuffled[family])


def test_the_same_weights_give_the_same_figures_however_many_are_decoded_together(parts: tuple) -> None:
    one, again, few = run(parts, 16), run(parts, 16), run(parts, 5)
    assert one == again
    for family in FAMILIES:
        for mode in Mode:
            assert one.cells[family][mode].mean_tokens == few.cells[family][mode].mean_tokens
            assert one.cells[family][mode].accuracy == few.cells[family][mode].accuracy
