"""Recipes of the data engine: those that ship say what the papers say; mistakes are told by line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r4b_core.config.load import RecipeError, dump_resolved
from r4b_core.curate.recipe import input_folder, load_curate_recipe, shipped_recipes, stage_folders

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_recipes_say_what_the_papers_say() -> None:
    assert list(shipped_recipes()) == ["mmfr-123k", "mmfr-586k", "r4b-annealing"]
    small, large, annealing = (load_curate_recipe(name).recipe for name in shipped_recipes())
    assert (small.select.pass_rate, large.select.pass_rate, annealing.select.pass_rate) == ("[0, 0]", "[0, 1)", None)
    assert (small.score.k, annealing.score.k, annealing.select.min_tries) == (4, 8, 8)
    assert annealing.select.modes == "r4b"
    teacher = small.generate.teacher
    assert (teacher.model, teacher.temperature, teacher.top_p, teacher.max_tokens) == (
        *("Qwen/Qwen3-VL-235B-A22B-Thinking", 1.0, 0.95, 16384),
    )
    assert small.score.student.model == "Qwen/Qwen3-VL-4B-Thinking"
    assert small.standardize.max_side == 2048 and small.standardize.max_images == 1
    differ = {"name", "select"}
    assert small.model_dump(exclude=differ) == large.model_dump(exclude=differ)


@pytest.mark.parametrize("name", ["mmfr-123k", "mmfr-586k", "r4b-annealing"])
def test_every_value_that_ships_says_where_it_is_from(name: str) -> None:
    """A comment on the line, or on the section that it stands in."""
    origin = re.compile(r"#.*\b(paper|code|ours|MMFineReason|preset)\b", re.I)
    sections: list[tuple[int, bool]] = []
    for line in shipped_recipes()[name].read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#") or line.startswith(("name:", "inputs:")):
            continue
        depth = len(line) - len(line.lstrip())
        sections = [(at, said) for at, said in sections if at < depth]
        said = origin.search(line) is not None or any(said for _, said in sections[1:])
        if line.split("#")[0].rstrip().endswith(":"):
            sections.append((depth, said))
        else:
            assert said or any(said for _, said in sections), line


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    resolved = load_curate_recipe("mmfr-123k", ["inputs=[a.jsonl]", "select.quotas={a: 3}"])
    (tmp_path / "again.yaml").write_text(dump_resolved(resolved))
    assert load_curate_recipe(tmp_path / "again.yaml").recipe == resolved.recipe
    assert resolved.origins["select.pass_rate"] == "preset mmfr-123k"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\nstandardize:\n  max_sid: 3", r"standardize.max_sid \(line 3\): unknown key; did you mean"),
        ("name: x\nselect:\n  pass_rate: 0.5", r"select.pass_rate \(line 3\) = 0.5: input should be a valid string"),
        ("name: x\nselect: {preset: mmfr}", r"select.preset \(line 2\) = \"mmfr\""),
        ("name: x\nstages: [verify, clean]", "stages"),
        ("inputs: []", "name: is required"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=told):
        load_curate_recipe(tmp_path / "bad.yaml")


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="mmfr-123k, mmfr-586k, r4b-annealing"):
        load_curate_recipe("mmfr")


def test_folders_keep_their_numbers_when_stages_are_left_out() -> None:
    recipe = load_curate_recipe("mmfr-123k", ["stages=[select, standardize, score]"]).recipe
    assert [str(folder) for folder in stage_folders(recipe, "r").values()] == [
        *("r/1-standardize", "r/4-score", "r/5-select"),
    ]
    assert input_folder(recipe, "r", "score") == Path("r/1-standardize")
    with pytest.raises(RecipeError, match="verify is not among them"):
        input_folder(recipe, "r", "verify")
    with pytest.raises(RecipeError, match="reads what a stage before it wrote"):
        input_folder(recipe, "r", "standardize")
