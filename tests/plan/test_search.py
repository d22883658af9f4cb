"""Which layouts are possible, fit and win, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r4b_core.config.load import RecipeError
from r4b_core.config.recipe import Recipe
from r4b_core.plan.machine import H100, H200
from r4b_core.plan.recipe import Assumptions, StagePlan, model_shape, named_shape, stage_plans
from r4b_core.plan.search import (
    check_gpus,
    check_recipe_layout,
    interleavings,
    layouts,
    nearest,
    problems,
    search,
    why_too_large,
)
from r4b_core.plan.shapes import SHAPES
from r4b_core.plan.work import RECOMPUTE, Layout

SHAPE = SHAPES["qwen3_vl-8b"]


def recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = dict(name="test", packing={"capacity": 32768}, model={"size": "4b", "dtype": "bfloat16"})
    return Recipe.model_validate({**base, **sections})


def stages(**sections: Any) -> list[StagePlan]:
    return stage_plans(recipe(**sections), SHAPE, Assumptions(text_tokens=2048))


def test_every_layout_uses_every_gpu_once() -> None:
    found = list(layouts(8))
    assert len(found) == len(set(found)) == 20  # ordered triples of divisors of 2^3
    assert all(layout.gpus == 8 for layout in found)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(pp=5), ("parallel.pp = 5", "36 layers", "nearest that does is 4")),
        (Layout(pp=8), ("parallel.pp = 8", "36 layers", "nearest that does is 9")),
        (Layout(tp=3), ("parallel.tp = 3", "32 attention heads", "nearest that does is 2")),
        (Layout(tp=16, sequence_parallel=True), ("parallel.tp = 16", "8 key-value heads", "nearest that does is 8")),
        (Layout(cp=16), ("parallel.cp = 16", "8 key-value", "nearest that divides both is 8")),
        (Layout(tp=4, cp=4), ("parallel.cp = 4", "2 key-value and 8 attention heads", "is 2")),
    ],
)
def test_an_impossible_value_is_named_with_its_rule_and_the_nearest_choice(
    layout: Layout, words: tuple[str, ...]
) -> None:
    text = "\n".join(problems(layout, SHAPE, 32768, H100))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(pp=4, interleave=2), ("parallel.virtual_stages = 2", "9 layers of a stage (pp 4)", "is 1")),
        (Layout(interleave=2), ("parallel.virtual_stages = 2", "pp is 1", "is 1")),
        (Layout(pp=18), ("parallel.pp = 18", "2 of 36 layers", "first 3", "nearest possible is 12")),
        (Layout(pp=6, interleave=3), ("parallel.pp * virtual_stages = 18", "2 of 36 layers", "is 12")),
    ],
)
def test_chunks_that_cannot_be(layout: Layout, words: tuple[str, ...]) -> None:
    (text,) = problems(layout, SHAPE, 32768, H100)
    assert all(word in text for word in words), text


def test_a_recipes_recomputation_and_chunks_are_kept_to() -> None:
    """Unless it names none: then everything is tried, and of each layout the fastest listed."""
    parallel = {"pp": 2, "virtual_stages": 3, "recompute": "full"}
    asked = recipe(parallel=parallel)
    assert interleavings(SHAPE, 3) == [3]
    assert check_recipe_layout(asked, SHAPE, H100) == Layout(pp=2, interleave=3)
    made = search(SHAPE, stages(parallel=parallel), 8, H200, ("full",), [3])
    assert {one.layout.interleave for one in made.fitting if one.layout.pp > 1} == {3}
    assert {one.recompute for one in made.fitting} == {"full"}
    assert interleavings(SHAPE, None) == [1, 2, 3, 4, 6]
    tried = search(SHAPE, stages(), 8, H200, RECOMPUTE, interleavings(SHAPE, None))
    assert len(tried.fitting) + len(tried.too_large) + len(tried.impossible) == 20
    assert any(one.layout.interleave > 1 for one in tried.fitting)


def test_tensor_parallelism_stays_within_a_node_and_capacity_splits() -> None:
    assert any("NVLink" in text for text in problems(Layout(tp=16), SHAPE, 32768, H100))
    (text,) = problems(Layout(tp=2, cp=4, sequence_parallel=True), SHAPE, 4100, H100)
    assert "packing.capacity = 4100" in text and "is 4096" in text


def test_a_good_layout_has_no_problems() -> None:
    assert problems(Layout(tp=4, pp=4, cp=2, sequence_parallel=True), SHAPE, 32768, H100) == []


@pytest.mark.parametrize(("gpus", "hint"), [(0, "try 1"), (12, "try 8"), (15, "try 16"), (-3, "try 1")])
def test_gpus_come_in_nodes(gpus: int, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        check_gpus(gpus, H100)


def test_nearest_prefers_the_smaller() -> None:
    assert nearest(3, [1, 2, 4]) == 2


def test_the_recipes_own_impossible_layout_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"parallel\.pp = 5.*nearest that does is 4"):
        check_recipe_layout(recipe(parallel={"pp": 5}), SHAPE, H100)
    assert check_recipe_layout(recipe(parallel={"pp": 4}), SHAPE, H100) == Layout(pp=4)


def test_what_fits_is_ranked_by_time_and_really_fits() -> None:
    made = search(SHAPE, stages(), 8, H100, RECOMPUTE)
    assert made.fitting and made.too_large
    hours = [one.hours for one in made.fitting]
    assert hours == sorted(hours)
    assert all(one.memory.total <= H100.memory for one in made.fitting)
    assert all(one.memory.total > H100.memory for one in made.too_large)
    assert len(made.fitting) + len(made.too_large) + len(made.impossible) == 20


def test_recompute_is_the_last_resort() -> None:
    """A layout that fits without it is listed without; larger memory turns more layouts into such."""
    small, large = (search(SHAPE, stages(), 8, gpu, RECOMPUTE) for gpu in (H100, H200))
    without = [sum(one.recompute == "none" for one in made.fitting) for made in (small, large)]
    assert without[0] < without[1]
    assert len(small.fitting) < len(large.fitting)


def test_why_a_layout_is_too_large_names_the_numbers() -> None:
    made = search(SHAPE, stages(), 8, H100, ("none",))
    text = why_too_large(made.too_large[-1], H100)
    assert "of 85.5" in text and "too much" in text and "recompute none" in text


def test_nothing_fits_on_one_small_gpu() -> None:
    made = search(SHAPE, stages(), 1, H100, RECOMPUTE)
    assert not made.fitting and len(made.too_large) == 1


def test_samples_fall_into_micro_batches() -> None:
    """64 samples of 1024 image (1,024 patches / 4 = 256 visual) tokens and 2,048 of text, at most 32,768 a time."""
    (pretrain, anneal, _) = stages()
    assert pretrain.sample_tokens == 2048 + 256
    work = anneal.work(8)
    assert work.tokens * work.micro_batches == 64 * 2304 / 8
    assert work.micro_batches == 1
    assert anneal.work(2).micro_batches == 3  # 73,728 tokens
    assert anneal.work(128).samples == 1  # a rank has at least one
    assert anneal.work(8).patches == 8 * 1024


def test_memory_is_planned_for_full_micro_batches() -> None:
    anneal = stages()[1]
    assert anneal.work(2).tokens < anneal.fullest(2).tokens == 32768


def test_static_packing_computes_the_padding_too() -> None:
    anneal = stages(packing={"capacity": 32768, "static": True})[1]
    assert anneal.work(8).tokens == 32768


def test_bpo_shares_each_prompt_and_scores_for_the_reference() -> None:
    bpo = stages(bpo={"prompts": 8, "group_size": 4, "max_new_tokens": 100})[2]
    prompt = 2048 + 256
    assert bpo.whole.tokens == 8 * (prompt + 8 * 100)
    assert bpo.whole.pairs == 8 * (prompt * (prompt + 1) / 2 + 8 * (100 * prompt + 100 * 101 / 2))
    assert bpo.whole.loss_rows == bpo.whole.responses * 100 == 6400
    assert bpo.whole.scored == 1 and bpo.execution.reference_copy and not bpo.execution.train_vision
    apart = stages(bpo={"prompts": 8, "group_size": 4, "max_new_tokens": 100, "share_prefix": False, "kl_coef": 0})[2]
    assert apart.whole.tokens == 8 * 8 * (prompt + 100) and apart.whole.patches == 8 * bpo.whole.patches
    assert apart.whole.scored == 0 and not apart.execution.reference_copy


def test_memory_is_planned_for_the_longest_responses_and_time_for_the_mean() -> None:
    assumed = Assumptions(text_tokens=2048, response_tokens=40)
    bpo = stage_plans(recipe(bpo={"max_new_tokens": 100}), SHAPE, assumed)[2]
    assert bpo.work(8).response_tokens == 40 and bpo.fullest(8).response_tokens == 100
    assert bpo.sample_tokens == 2048 + 256 + 100


def test_tiles_do_not_attend_to_each_other() -> None:
    vision = model_shape(recipe().model).vision
    assert vision is not None
    assert vision.attention_pairs(4 * 729) == 4 * vision.attention_pairs(729)


def test_frozen_by_learning_rate() -> None:
    optim = {"lr": 1e-5, "lr_scale": {"vision": 0.0}}
    assert not stages(anneal={"optim": optim})[1].execution.train_vision


def test_a_sample_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"packing\.capacity = 2048: a sample of \w+ has \d+ tokens.*does is \d+"):
        stages(packing={"capacity": 2048})


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to plan"):
        stages(pretrain={"steps": 0}, anneal={"steps": 0}, bpo={"steps": 0})


def test_models_by_name() -> None:
    assert model_shape(recipe().model).decoder == SHAPES["qwen3-4b"].decoder
    assert model_shape(recipe(model={"size": "toy", "shape": {"num_layers": 3}}).model).decoder.num_layers == 3
    with pytest.raises(ValueError, match="there is no shape of 'gpt'; there are llama3.1-8b"):
        named_shape("gpt")


def test_only_text_needs_no_eyes() -> None:
    text = replace(SHAPE, vision=None)
    (plan, *_) = stage_plans(recipe(), text, Assumptions(text_tokens=2048))
    assert plan.whole.patches == 0 and plan.sample_tokens == 2048
