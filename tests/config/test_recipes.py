"""The shipped recipes of real models against the papers' tables, and what they say of each value."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from r4b_core.cli.layout import fit
from r4b_core.config.load import ResolvedRecipe, builtin_recipes, load_recipe
from r4b_core.plan.machine import GPUS
from r4b_core.plan.recipe import Assumptions, model_shape, stage_plans
from r4b_core.plan.search import candidate
from r4b_core.plan.work import Layout

ON_THIS_MACHINE = ("demo", "smoke")
REAL = [name for name in builtin_recipes() if name not in ON_THIS_MACHINE]
QWEN_SFT = [name for name in REAL if name.endswith("-sft")]
QWEN_GSPO = [name for name in REAL if name.endswith("-gspo")]

# Where a value may come from. What a paper does not say begins with "not published" and gives a reason.
ORIGINS = (
    *("Table ", "Fig", "Eq. ", "section ", "B.3", "SigLIP2", "the authors' repository", "ours"),
    *("not published; ", "another recipe", "not part of it", "the stage before", "qwen3-vl-"),
)

# R-4B, Table I: packed length, batch, schedule, first learning rate of vision tower, projector and language model.
R4B_STAGES = {
    "r4b-4b-pretrain-1": ("pretrain", 8192, 512, "cosine", (0, 1e-3, 0)),
    "r4b-4b-pretrain-2": ("pretrain", 16384, 2048, "cosine", (4e-5, 4e-5, 0)),
    "r4b-4b-pretrain-3": ("pretrain", 16384, 1024, "constant", (4e-6, 4e-6, 4e-5)),
    "r4b-4b-anneal": ("anneal", 16384, 1024, "cosine", (4e-6, 4e-6, 4e-5)),
}
PARTS = ("vision", "projector", "decoder")


@cache
def resolved(name: str) -> ResolvedRecipe:
    return load_recipe(name)


def test_all_that_were_promised_ship() -> None:
    assert set(REAL) == {
        *R4B_STAGES,
        "r4b-4b-bpo",
        *(f"qwen3-vl-{size}-{what}" for size in ("2b", "4b", "8b") for what in ("sft", "gspo")),
    }


@pytest.mark.parametrize("name", REAL)
def test_every_value_says_where_it_comes_from(name: str) -> None:
    recipe = resolved(name)
    for key, value, origin in recipe.values():
        if origin.startswith(f"{name}.yaml:") and key not in ("name", "model.family", "data.task"):
            note = recipe.notes.get(key, "")
            assert note.startswith(ORIGINS), f"{key} = {value}: {note!r}"
            if "not published" in note:
                assert "our choice because" in note or "fill about" in note, f"{key}: {note!r} gives no reason"


@pytest.mark.parametrize("name", REAL)
def test_each_fits_the_ranks_that_its_head_starts_and_one_machine(name: str) -> None:
    recipe = resolved(name)
    lines = recipe.source.read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if line.startswith("#   torchrun")]
    assert command.endswith(f" train {name}")
    nodes = 8 if "--nnodes=8" in command else 1
    assert "--nproc-per-node=8" in command
    for ranks in {8, 8 * nodes}:
        fit(recipe.recipe, ranks)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, set[str]]]:
    """The parts of each family's model: the first words of its parameters' names."""
    from r4b_core.config.recipe import ModelConfig, ParallelConfig
    from r4b_core.models.families import build_model
    from r4b_core.parallel import runtime

    ranks = runtime.start(ParallelConfig(), seed=0)
    families = {"r4b": ModelConfig(family="r4b"), "qwen3_vl": ModelConfig(family="qwen3_vl")}
    models = {name: build_model(model, ParallelConfig(), 0) for name, model in families.items()}
    yield {name: {key.split(".")[0] for key, _ in model.named_parameters()} for name, model in models.items()}
    ranks.stop()


@pytest.mark.parametrize("name", REAL)
def test_rates_and_freezing_name_parts_that_there_are(name: str, parts: dict[str, set[str]]) -> None:
    recipe = resolved(name).recipe
    named = set(recipe.bpo.freeze)
    for stage in (recipe.pretrain, recipe.anneal, recipe.distill, recipe.bpo):
        if stage.steps:
            named |= {*stage.optim.lr_scale, *stage.optim.constant}
    assert named <= parts[recipe.model.family]


@pytest.mark.parametrize("name", REAL)
def test_its_own_layout_has_room_on_80_gb(name: str) -> None:
    recipe = resolved(name)
    nodes = 8 if "--nnodes=8" in recipe.source.read_text(encoding="utf-8") else 1
    shape, layout = model_shape(recipe.recipe.model), recipe.recipe.parallel
    plans = stage_plans(recipe.recipe, shape, Assumptions(text_tokens=3000 if name in QWEN_SFT else 600))
    dp = 8 * nodes // (layout.tp * layout.pp * layout.cp)
    asked = Layout(layout.tp, layout.pp, layout.cp, dp, layout.virtual_stages, layout.sequence_parallel)
    assert candidate(shape, plans, asked, GPUS["h100"], layout.recompute).memory.fits(GPUS["h100"])


@pytest.mark.parametrize("name", REAL)
def test_one_stage_each(name: str) -> None:
    recipe = resolved(name).recipe
    steps = {stage: getattr(recipe, stage).steps for stage in ("pretrain", "anneal", "distill", "bpo")}
    assert [stage for stage, count in steps.items() if count] == [
        R4B_STAGES[name][0] if name in R4B_STAGES else "distill" if name in QWEN_SFT else "bpo"
    ]


@pytest.mark.parametrize("name", R4B_STAGES)
def test_r4b_table_one(name: str) -> None:
    section, length, batch, schedule, rates = R4B_STAGES[name]
    recipe = resolved(name).recipe
    stage = getattr(recipe, section)
    assert (recipe.packing.capacity, stage.batch_size, stage.optim.schedule) == (length, batch, schedule)
    assert tuple(stage.optim.lr * stage.optim.lr_scale.get(part, 1) for part in PARTS) == pytest.approx(rates)
    assert stage.optim.lr * stage.optim.lr_scale.get("embedding", 1) == pytest.approx(rates[2])


def test_only_the_language_models_rate_falls_in_annealing() -> None:
    optim = resolved("r4b-4b-anneal").recipe.anneal.optim
    assert optim.lr * optim.min_lr_ratio == pytest.approx(4e-6)
    assert set(optim.constant) == {"vision", "projector", "image_newline"} == set(optim.lr_scale)


def test_bpo_is_the_papers_objective() -> None:
    bpo = resolved("r4b-4b-bpo").recipe.bpo
    assert (bpo.algorithm, bpo.rollouts, bpo.advantage, bpo.std, bpo.length_cost) == ("bpo", "both", "union", True, 0)
    assert bpo.kl_coef > 0 and bpo.steps == 320 and 2 * bpo.group_size == 16


@pytest.mark.parametrize("name", QWEN_SFT)
def test_mmfinereason_table_eight(name: str) -> None:
    recipe = resolved(name).recipe
    stage, optim = recipe.distill, recipe.distill.optim
    assert (stage.batch_size, recipe.packing.capacity, optim.lr, optim.schedule) == (32, 32768, 1e-5, "cosine")
    assert (optim.weight_decay, round(optim.warmup_steps / stage.steps, 3)) == (0, 0.03)
    assert (recipe.data.min_pixels, recipe.data.max_pixels) == (32**2, 768**2)
    assert (recipe.model.family, recipe.model.size) == ("qwen3_vl", name.split("-")[2])


@pytest.mark.parametrize("name", QWEN_GSPO)
def test_mmfinereason_table_nine(name: str) -> None:
    recipe = resolved(name).recipe
    bpo, optim = recipe.bpo, recipe.bpo.optim
    assert (bpo.algorithm, bpo.importance, bpo.rollouts) == ("gspo", "sequence", "free")
    assert (bpo.steps, bpo.prompts, 2 * bpo.group_size, bpo.temperature) == (300, 256, 16, 1.0)
    assert (bpo.clip_low, bpo.clip_high, bpo.max_new_tokens) == (3e-4, 4e-4, 16384)
    assert (optim.lr, optim.schedule, optim.weight_decay, optim.warmup_steps) == (1e-6, "constant", 0.1, 10)
    assert recipe.packing.capacity >= 8192 + 16384
    assert recipe.model.init_from == f"runs/{name.removesuffix('gspo')}sft"


def test_a_recipe_is_the_stage_after_another() -> None:
    for name in REAL:
        start = resolved(name).recipe.model.init_from
        assert start is not None
        if start.startswith("runs/"):
            assert Path(start).name in REAL
