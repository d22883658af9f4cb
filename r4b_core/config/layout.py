"""Does a parallel layout fit the ranks and the model? Answered from numbers alone, before anything is launched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from r4b_core.config.load import RecipeError
from r4b_core.config.recipe import Recipe


class ModelShape(Protocol):
    """What of a model's shape a layout has to divide (``r4b_core.models.r4b.R4BConfig`` has it)."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def vision_num_heads(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """How the ranks are used: world size = tp * pp * cp * dp."""

    tp: int
    pp: int
    cp: int
    dp: int

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp} x cp {self.cp} x dp {self.dp}"


def world_size_from_environment() -> int:
    """torchrun's ``WORLD_SIZE``, or 1 where nothing launched us."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_layout(recipe: Recipe, world_size: int, shape: ModelShape) -> Layout:
    """The layout of a recipe on ``world_size`` ranks.

    Raises:
        RecipeError: with everything that does not divide, each naming the setting, its value and the way out.
    """
    tp, pp, cp = recipe.parallel.tp, recipe.parallel.pp, recipe.parallel.cp
    problems: list[str] = []
    ranks = tp * pp * cp
    if world_size % ranks:
        problems.append(
            f"parallel: tp {tp} x pp {pp} x cp {cp} needs a multiple of {ranks} ranks, there are {world_size}: "
            f"start with `torchrun --nproc-per-node={ranks * max(1, world_size // ranks)}` or make the layout smaller"
        )

    def must_divide(key: str, divisor: int, what: str, number: int) -> None:
        if number % divisor:
            possible = ", ".join(str(d) for d in range(1, number + 1) if number % d == 0 and d <= 64)
            problems.append(f"{key} = {divisor}: does not divide the {number} {what}; possible are {possible}")

    must_divide("parallel.pp", pp, "layers of the decoder", shape.num_layers)
    over_heads = "parallel.tp" if cp == 1 else "parallel.cp" if tp == 1 else "parallel.tp * parallel.cp"
    must_divide(over_heads, tp * cp, "attention heads", shape.num_heads)
    must_divide(over_heads, tp * cp, "key-value heads", shape.num_kv_heads)
    must_divide("parallel.tp", tp, "attention heads of the vision tower", shape.vision_num_heads)
    must_divide("parallel.tp", tp, "entries of the vocabulary", shape.vocab_size)
    pieces = cp * (tp if recipe.parallel.sequence_parallel else 1)
    if recipe.packing.capacity % pieces:
        rounded = -(-recipe.packing.capacity // pieces) * pieces
        problems.append(
            f"packing.capacity = {recipe.packing.capacity}: the stream is cut into {pieces} equal pieces "
            f"(cp {cp}, sequence_parallel {str(recipe.parallel.sequence_parallel).lower()}); take {rounded}"
        )
    if problems:
        raise RecipeError(f"recipe {recipe.name}", problems)
    return Layout(tp, pp, cp, world_size // ranks)
