"""The model families by name: what a recipe's ``model`` section resolves to and builds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from r4b_core.config.recipe import ModelConfig, ParallelConfig

if TYPE_CHECKING:
    from r4b_core.models.decoder import DecoderModel
    from r4b_core.models.qwen3_vl.config import Qwen3VLConfig
    from r4b_core.models.r4b.config import R4BConfig


def resolve(model: ModelConfig) -> R4BConfig | Qwen3VLConfig:
    """The shape that a recipe names.

    Raises:
        ValueError: unknown size or shape field, or a shape that contradicts itself.
    """
    return import_module(f"r4b_core.models.{model.family}.config").resolve(model)


def build_model(model: ModelConfig, parallel: ParallelConfig, seed: int, chunk: int = 0) -> DecoderModel:
    """This rank's pipeline stage (chunk of it) with initial weights that do not depend on the layout."""
    return import_module(f"r4b_core.models.{model.family}.model").build_model(model, parallel, seed, chunk)


def build_chunks(model: ModelConfig, parallel: ParallelConfig, seed: int) -> list[DecoderModel]:
    """All that this rank holds of the model: one chunk for each virtual stage."""
    return [build_model(model, parallel, seed, chunk) for chunk in range(parallel.virtual_stages)]
