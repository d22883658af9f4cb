"""Recipes: what is refused and in which words, and where each value is said to come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from r4b_core.config.load import (
    RecipeError,
    ResolvedRecipe,
    builtin_recipes,
    dump_resolved,
    fingerprint,
    load_recipe,
)
from r4b_core.config.recipe import PRESETS


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(folder, text), overrides)
    return caught.value.problems


def origins(resolved: ResolvedRecipe) -> dict[str, tuple[object, str]]:
    return {key: (value, origin) for key, value, origin in resolved.values()}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("bpo.stepz", "bpo.steps"),
        ("bpo.lr", "bpo.optim.lr"),
        ("lr", "pretrain.optim.lr"),
        ("bpo.group_sise", "bpo.group_size"),
        ("pararel", "parallel"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, key: str, meant: str) -> None:
    assert problems(tmp_path, "name: x", f"{key}=1") == [f"{key} (command line): unknown key; did you mean {meant}?"]


def test_unknown_key_with_nothing_near_lists_what_there_is(tmp_path: Path) -> None:
    assert problems(tmp_path, "name: x\npacking: {zzz: 1}") == [
        "packing.zzz (line 2): unknown key; packing holds capacity, static"
    ]


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    text = "name: x\nbpo:\n  group_size: many\n  clip_low: -1\n  stepz: 3\nanneal: 3\n"
    found = problems(tmp_path, text, "seed=-1", "oops")
    assert len(found) == 6
    joined = "\n".join(found)
    assert 'bpo.group_size (line 3) = "many": input should be a valid integer' in joined
    assert "bpo.clip_low (line 4) = -1: input should be greater than 0" in joined
    assert "bpo.stepz (line 5): unknown key" in joined
    assert "anneal (line 6): is set to 3, but is a section of steps, batch_size" in joined
    assert "seed (command line) = -1" in joined
    assert "'oops' on the command line: an override is KEY=VALUE" in joined


def test_message_of_several_problems_is_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^some\.yaml: 2 problems\n  - .*\n  - .*$"):
        load_recipe(recipe_file(tmp_path, "name: x\na: 1\nb: 2"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: x\nseed: 1\nname: y", "name: set twice, first on line 1"),
        ("name: x\nbpo:\n  steps: 1\n  steps: 2", "bpo.steps: set twice, first on line 3"),
        ("name: x\nbpo: &a {steps: 1}\nanneal: *a", "*a: aliases are not allowed, write the values out"),
        ("1: x", "1: a key must be plain text"),
        ("- x", "a recipe is a mapping of settings, this is a list"),
        ("", "a recipe is a mapping of settings, this is empty"),
        ("seed: 1", "name: is required and not set"),
    ],
)
def test_refused_texts(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text) == [problem]


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (problem,) = problems(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch [{marker}]")
    assert "could not determine a constructor" in problem
    assert not marker.exists()


def test_a_switch_is_no_number(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "name: x\nbpo: {steps: true}")
    assert problem.startswith("bpo.steps (line 2) = true")


def test_sequence_parallel_without_tp_says_the_way_out(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "name: x", "parallel.sequence_parallel=true")
    assert problem.startswith("parallel: sequence_parallel=true") and "set tp >= 2 or turn it off" in problem


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = "name: no\nanneal:\n  optim: {lr: 1e-3, eps: 1e-9}\nbpo: {thinking_band: [0.1, 1]}"
    recipe = load_recipe(recipe_file(tmp_path, text)).recipe
    assert (recipe.name, recipe.anneal.optim.lr, recipe.anneal.optim.eps) == ("no", 1e-3, 1e-9)
    assert recipe.bpo.thinking_band == (0.1, 1.0)


def test_a_section_keeps_its_own_defaults(tmp_path: Path) -> None:
    """Setting one key of pretrain.optim must not put the rest back to OptimConfig's defaults."""
    optim = load_recipe(recipe_file(tmp_path, "name: x\npretrain: {optim: {weight_decay: 0.3}}")).recipe.pretrain.optim
    assert (optim.weight_decay, optim.lr, optim.schedule, optim.warmup_steps) == (0.3, 3e-3, "cosine", 50)


def test_origins(tmp_path: Path) -> None:
    text = "name: x\nbpo:\n  algorithm: gspo\n  clip_high: 0.5\nanneal:\n  optim: {lr: 1e-3}\n"
    values = origins(load_recipe(recipe_file(tmp_path, text), ["bpo.steps=7", "bpo.mix.read=0.5"]))
    assert values["name"] == ("x", "some.yaml:1")
    assert values["bpo.algorithm"] == ("gspo", "some.yaml:3")
    assert values["bpo.clip_low"] == (PRESETS["gspo"]["clip_low"], "preset gspo")
    assert values["bpo.clip_high"] == (0.5, "some.yaml:4")
    assert values["anneal.optim.lr"] == (1e-3, "some.yaml:6")
    assert values["anneal.optim.warmup_steps"] == (50, "default")
    assert values["bpo.steps"] == (7, "command line")
    assert values["bpo.mix"] == ({"read": 0.5, "count": 0.2, "value": 0.6}, "command line")


def test_the_preset_follows_an_overridden_algorithm(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "name: x\nbpo: {algorithm: grpo}")
    for algorithm, preset in PRESETS.items():
        bpo = load_recipe(path, [f"bpo.algorithm={algorithm}"]).recipe.bpo
        assert {key: getattr(bpo, key) for key in preset} == preset


def test_dump_loads_to_the_same_recipe(tmp_path: Path) -> None:
    first = load_recipe("demo", ["bpo.algorithm=dapo", "anneal.optim.eps=1e-12", "model.shape.num_layers=4"])
    assert load_recipe(recipe_file(tmp_path, dump_resolved(first))).recipe == first.recipe


def test_fingerprint_follows_the_values() -> None:
    demo = load_recipe("demo").recipe
    assert fingerprint(demo.bpo) == fingerprint(load_recipe("demo").recipe.bpo)
    assert fingerprint(demo.bpo) != fingerprint(load_recipe("demo", ["bpo.kl_coef=0.2"]).recipe.bpo)


def test_shipped_recipes_load_by_name_and_by_path() -> None:
    assert {"demo", "smoke"} <= set(builtin_recipes())
    for name, path in builtin_recipes().items():
        assert load_recipe(name).recipe == load_recipe(path).recipe == load_recipe(f"recipes/{name}.yaml").recipe


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"dmo: no such file.*demo"):
        load_recipe("dmo")


def test_a_comment_is_the_reason_of_its_value(tmp_path: Path) -> None:
    text = """name: x  # what it is called
bpo:
  steps: 3       # Fig. 8
                 # runs to 320
  # of its own, and about nothing
  optim: {lr: 1e-6, weight_decay: 0.1}  # Table 9
  mix: {a: 1}
  group_size: 2  # overridden
anneal:  # Table I
  steps: 1
  tries: 8  # section 2.1
"""
    resolved = load_recipe(recipe_file(tmp_path, text), ["bpo.group_size=4"])
    assert resolved.notes == {
        "name": "what it is called",
        "bpo.steps": "Fig. 8 runs to 320",
        "bpo.optim.lr": "Table 9",
        "bpo.optim.weight_decay": "Table 9",
        "anneal.steps": "Table I",
        "anneal.tries": "section 2.1",
    }
