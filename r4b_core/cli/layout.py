"""A recipe's parallel layout against its model's shape."""

from __future__ import annotations

from r4b_core.config.layout import Layout, check_layout
from r4b_core.config.recipe import Recipe


def fit(recipe: Recipe, world_size: int) -> Layout:
    """The layout of a recipe on that many ranks.

    Raises:
        RecipeError: naming every setting that does not fit the ranks or the model.
    """
    from r4b_core.parallel import device

    device.activate()  # before anything imports Megatron-Core

    from r4b_core.models.families import resolve

    return check_layout(recipe, world_size, resolve(recipe.model))
