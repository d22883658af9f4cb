"""The recipe of the data engine: one typed YAML from raw files to what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

import r4b_core
from r4b_core.config.load import RecipeError, Resolved, load_settings
from r4b_core.config.recipe import Settings
from r4b_core.curate.generate import GenerateSettings
from r4b_core.curate.score import ScoreSettings
from r4b_core.curate.select import PRESETS, SelectSettings
from r4b_core.curate.standardize.rewrite import RewriteSettings
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.verify import VerifySettings
from r4b_core.curate.wire import ServedModel

StageName = Literal["standardize", "generate", "verify", "score", "select"]
STAGES: tuple[StageName, ...] = ("standardize", "generate", "verify", "score", "select")


class CurateRecipe(Settings):
    """Everything that one curated data set depends on."""

    name: str
    seed: int = Field(0, ge=0, description="of what select chooses; generate and score have their own")
    inputs: list[InputSettings] = Field(default_factory=list, description="raw files, in the order that decides ties")
    workers: int | None = Field(None, ge=0, description="processes; none: one per core; 0: this process alone")
    stages: list[StageName] = Field(default_factory=lambda: list(STAGES), description="what `r4b curate run` does")
    standardize: StandardizeSettings = StandardizeSettings()
    rewrite: RewriteSettings = RewriteSettings()
    generate: GenerateSettings = GenerateSettings()
    verify: VerifySettings = VerifySettings()
    judge: ServedModel = Field(
        ServedModel(model="Qwen/Qwen3-30B-A3B-Thinking-2507", temperature=0.0, max_tokens=8192),
        description="of what the rules of verify and score cannot decide, and of nothing else; without endpoints: none",
    )
    score: ScoreSettings = ScoreSettings()
    select: SelectSettings = SelectSettings()

    @field_validator("stages")
    @classmethod
    def _stages_are_some(cls, stages: list[StageName]) -> list[StageName]:
        if not stages or len(set(stages)) < len(stages):
            raise ValueError(f"name at least one stage, and each once; they run in the order {', '.join(STAGES)}")
        return stages


def models_without_endpoints(recipe: CurateRecipe, stages: Sequence[StageName]) -> list[str]:
    """What has to be named before these stages can run, one sentence each."""
    needed = []
    if "generate" in stages:
        needed.append(("generate.teacher", recipe.generate.teacher))
        if recipe.generate.caption.enabled:
            needed.append(("generate.caption.captioner", recipe.generate.caption.captioner))
    if "score" in stages:
        needed.append(("score.student", recipe.score.student))
    return [
        f"{key}.endpoints is empty: start a server of {model.model} and name it, such as "
        f"{key}.endpoints=[http://host:8000/v1]"
        for key, model in needed
        if not model.endpoints
    ]


def stage_folders(recipe: CurateRecipe, run: str | Path) -> dict[StageName, Path]:
    """Where each stage of the recipe puts its output: ``1-standardize``, ``2-generate``, ... whichever are left out."""
    return {stage: Path(run) / f"{1 + STAGES.index(stage)}-{stage}" for stage in STAGES if stage in recipe.stages}


def input_folder(recipe: CurateRecipe, run: str | Path, stage: StageName) -> Path:
    """Where a stage's input lies: the output of the one before it.

    Raises:
        RecipeError: the recipe leaves the stage out, or begins with it.
    """
    folders = stage_folders(recipe, run)
    names = list(folders)
    if stage not in folders:
        raise RecipeError(recipe.name, [f"stages = {names}: {stage} is not among them: add it"])
    if stage == names[0]:
        raise RecipeError(recipe.name, [f"stages = {names}: {stage} reads what a stage before it wrote: add one"])
    return folders[names[names.index(stage) - 1]]


def shipped_recipes() -> dict[str, Path]:
    """The recipes of the data engine that ship with r4b, by name."""
    package = Path(r4b_core.__file__).parent
    checkout = package.parent / "recipes" / "curate"
    inside = package / "recipes" / "curate"
    folder = checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else inside
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_curate_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Resolved[CurateRecipe]:
    """Read a recipe: a file, or the name of a shipped one (``mmfr-123k``); see `r4b_core.config.load.load_recipe`.

    Raises:
        RecipeError: with every problem found.
    """
    return load_settings(_find(name), overrides, CurateRecipe, _presets)


def _find(name: str | Path) -> Path:
    path, shipped = Path(name), shipped_recipes()
    if path.is_file():
        return path
    if path in (Path(path.stem), Path("curate", path.stem), Path("recipes", "curate", f"{path.stem}.yaml")):
        if path.stem in shipped:
            return shipped[path.stem]
    raise RecipeError(str(name), [f"no such file, nor a recipe of the data engine ({', '.join(shipped) or 'none'})"])


def _presets(asked: Callable[..., Any]) -> tuple[str, Mapping[str, Any]] | None:
    preset = asked("select", "preset")
    known = isinstance(preset, str) and preset in PRESETS
    return (preset, {"select": PRESETS[preset]}) if known else None
