"""A trained model from a run folder or one of its checkpoints, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from r4b_core.config.recipe import ParallelConfig, Recipe
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel import runtime as parallel_runtime
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.telemetry.locate import locate


@dataclass(frozen=True)
class Trained:
    recipe: Recipe
    runtime: Runtime
    tokenizer: ToyTokenizer
    model: R4BModel
    engine: EmbeddedEngine
    path: Path


@contextmanager
def trained_model(run_or_checkpoint: Path) -> Iterator[Trained]:
    """Load the newest checkpoint of a run, or the one that is named, whatever layout it was trained in.

    Raises:
        ValueError: if there is no run or no complete checkpoint there.
    """
    path, recipe_path = locate(Path(run_or_checkpoint))
    recipe = Recipe.model_validate(yaml.safe_load(recipe_path.read_text()))
    recipe = recipe.model_copy(update={"parallel": ParallelConfig()})
    runtime = parallel_runtime.start(recipe.parallel, seed=recipe.seed)
    try:
        model = build_model(recipe.model, recipe.parallel, recipe.seed)
        checkpoint.load_weights(path, [model])
        tokenizer = ToyTokenizer()
        engine = EmbeddedEngine(model, tokenizer.mode_tokens, tokenizer.vocab_size, recipe.evaluate.batch)
        yield Trained(recipe, runtime, tokenizer, model, engine, path)
    finally:
        runtime.stop()
