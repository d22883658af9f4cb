"""A model to ask, on one rank: a run's newest checkpoint, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml

from r4b_core.config.recipe import ParallelConfig, Recipe
from r4b_core.data.tokenizer import Tokenizer
from r4b_core.models.convert import load_weights, read_config
from r4b_core.models.convert.huggingface import CONFIG, convert_module
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.families import resolve
from r4b_core.models.processor import Processor, processor_of
from r4b_core.models.qwen3_vl.model import Qwen3VLModel
from r4b_core.models.r4b.config import DTYPES
from r4b_core.models.r4b.model import R4BModel
from r4b_core.parallel import checkpoint, device
from r4b_core.parallel import runtime as parallel_runtime
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.telemetry.locate import locate
from r4b_core.telemetry.run import RECIPE

_MODELS: dict[str, type[DecoderModel]] = {"r4b": R4BModel, "qwen3_vl": Qwen3VLModel}


@dataclass(frozen=True)
class Found:
    """What there is to know of a model before its weights are read.

    Attributes:
        recipe: the run's; of a Hugging Face folder its model alone, without stages.
        path: the folder that holds the weights.
        from_hugging_face: whether they are safetensors under the authors' names.
    """

    recipe: Recipe
    path: Path
    processor: Processor
    from_hugging_face: bool

    @property
    def weight_bytes(self) -> int:
        """What the weights will take in memory."""
        model = self.recipe.model
        rules = convert_module(model.family).rules(resolve(model))
        return sum(rule.numel for rule in rules) * DTYPES[model.dtype].itemsize


@dataclass(frozen=True)
class Trained:
    recipe: Recipe
    runtime: Runtime
    processor: Processor
    model: DecoderModel
    engine: EmbeddedEngine
    path: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer


def find_model(folder: Path) -> Found:
    """What a folder holds: a run, a checkpoint, what `r4b convert` made, or a Hugging Face checkpoint.

    Raises:
        ValueError: if it is none of them, has no complete checkpoint yet, or its tokenizer or image settings are
            missing or do not fit.
    """
    if (folder / CONFIG).is_file() and not (folder / RECIPE).is_file():
        recipe, path, theirs = _without_stages(folder), folder, True
    else:
        if not folder.exists():
            raise ValueError(f"{folder}: there is no such folder")
        try:
            path, recipe_path = locate(folder)
        except ValueError as error:
            raise ValueError(f"{error}, nor a Hugging Face checkpoint (config.json and *.safetensors)") from error
        recipe, theirs = Recipe.model_validate(yaml.safe_load(recipe_path.read_text())), False
    recipe = recipe.model_copy(update={"parallel": ParallelConfig()})
    return Found(recipe, path, processor_of(recipe.model, recipe.data), theirs)


def _without_stages(folder: Path) -> Recipe:
    stages = {stage: {"steps": 0} for stage in ("pretrain", "anneal", "distill", "bpo")}
    return Recipe.model_validate(
        {"name": folder.resolve().name, "model": read_config(folder), "data": {"task": "records"}, **stages}
    )


def check_memory(found: Found) -> None:
    """
    Raises:
        ValueError: if the weights do not fit into what is free on the device.
    """
    free, where = free_memory()
    if found.weight_bytes > free:
        raise ValueError(
            f"{found.path}: its weights take {found.weight_bytes / 1e9:.1f} GB as {found.recipe.model.dtype} and "
            f"{free / 1e9:.1f} GB are free on {where}: free some, take a smaller model, or another machine"
        )


def free_memory() -> tuple[int, str]:
    """Bytes free where a model would be built, and the name of that place."""
    place = device.device()
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0], str(place)
    return psutil.virtual_memory().available, "the host (no GPU here)"


@contextmanager
def open_model(found: Found) -> Iterator[Trained]:
    """Build the model and read its weights.

    Raises:
        ValueError: if the weights do not fit into memory, are damaged, incomplete, or of another model.
    """
    check_memory(found)
    recipe = found.recipe
    runtime = parallel_runtime.start(recipe.parallel, seed=recipe.seed)
    try:
        # Not `build_model`: initial weights would be drawn for nothing.
        model = _MODELS[recipe.model.family](resolve(recipe.model), recipe.parallel, recipe.model.dtype)
        if found.from_hugging_face:
            load_weights(model, found.path)
        else:
            checkpoint.load_weights(found.path, [model])
        tokenizer = found.processor.tokenizer
        engine = EmbeddedEngine(model, tokenizer.mode_tokens, tokenizer.vocab_size, recipe.evaluate.batch)
        yield Trained(recipe, runtime, found.processor, model, engine, found.path)
    finally:
        runtime.stop()


@contextmanager
def trained_model(folder: Path) -> Iterator[Trained]:
    """The model in a folder, whatever layout it was trained in. Raises as `find_model` and `open_model`."""
    with open_model(find_model(Path(folder))) as trained:
        yield trained
