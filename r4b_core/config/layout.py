"""Does a parallel layout fit the ranks and the model? Answered from numbers alone, before anything is launched."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from r4b_core.config.load import RecipeError
from r4b_core.config.recipe import Recipe


class ModelShape(Protocol):
    """What of a model's shape a layout has to divide; ``R4BConfig`` and ``Qwen3VLConfig`` have it.

    A family may have more: ``ffn_hidden_size`` and ``vision_ffn_hidden_size``, ``deepstack_layers`` (what the vision
    tower adds to the decoder's first layers), and ``parts``, the first parts of all parameters' names.
    """

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
        RecipeError: with everything that does not fit, each naming the setting, its value and the nearest valid choice.
    """
    parallel = recipe.parallel
    ranks = parallel.tp * parallel.pp * parallel.cp
    problems = []
    if world_size % ranks:
        problems.append(
            f"parallel: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} needs a multiple of {ranks} ranks, "
            f"there are {world_size}: start with `torchrun --nproc-per-node={ranks * max(1, world_size // ranks)}` or "
            "make the layout smaller"
        )
    else:
        problems += _too_many_replicas(recipe, world_size // ranks)
    problems += [*_stages(recipe, shape), *_shards(recipe, shape), *_stream(recipe), *_parts(recipe, shape)]
    if problems:
        raise RecipeError(f"recipe {recipe.name}", problems)
    return Layout(parallel.tp, parallel.pp, parallel.cp, world_size // ranks)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(value: int, allowed: list[int]) -> int:
    """The closest to ``value``, the smaller of two."""
    return min(allowed, key=lambda other: (abs(other - value), other))


def _indivisible(setting: str, divisor: int, what: str, number: int) -> Iterator[str]:
    if number % divisor:
        possible = _divisors(number)
        shown = ", ".join(str(d) for d in possible if d <= 64)
        yield (
            f"{setting} = {divisor}: does not divide the {number} {what}; possible are {shown}, "
            f"the nearest is {_nearest(divisor, possible)}"
        )


def _stages(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """What pipeline stages, and chunks of them, need of the decoder's layers."""
    pp, virtual = recipe.parallel.pp, recipe.parallel.virtual_stages
    if shape.num_layers % pp:
        yield from _indivisible("parallel.pp", pp, "layers of the decoder", shape.num_layers)
        return
    if shape.num_layers // pp % virtual:
        yield from _indivisible(
            "parallel.virtual_stages", virtual, f"layers of a stage (pp {pp})", shape.num_layers // pp
        )
        return
    needed = len(getattr(shape, "deepstack_layers", ()))
    if (first := shape.num_layers // (pp * virtual)) < needed:
        setting, value = ("parallel.pp", pp) if virtual == 1 else ("parallel.pp * virtual_stages", pp * virtual)
        allowed = [d for d in _divisors(shape.num_layers) if shape.num_layers // d >= needed]
        yield (
            f"{setting} = {value}: the first of {value} parts has {first} of {shape.num_layers} layers, "
            f"and DeepStack adds to the first {needed}, which must lie with the vision tower; the nearest possible is "
            f"{_nearest(value, allowed)}"
        )


def _shards(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """What tensor and context parallelism cut."""
    tp, cp = recipe.parallel.tp, recipe.parallel.cp
    over_heads = "parallel.tp" if cp == 1 else "parallel.cp" if tp == 1 else "parallel.tp * parallel.cp"
    yield from _indivisible(over_heads, tp * cp, "attention heads", shape.num_heads)
    yield from _indivisible(over_heads, tp * cp, "key-value heads", shape.num_kv_heads)
    yield from _indivisible("parallel.tp", tp, "attention heads of the vision tower", shape.vision_num_heads)
    yield from _indivisible("parallel.tp", tp, "entries of the vocabulary", shape.vocab_size)
    widths = {"ffn_hidden_size": "columns of the MLP", "vision_ffn_hidden_size": "columns of the vision tower's MLP"}
    for name, what in widths.items():
        yield from _indivisible("parallel.tp", tp, what, getattr(shape, name, tp))


def _stream(recipe: Recipe) -> Iterator[str]:
    """Micro-batches are padded to a multiple of tp * cp, and cut into as many pieces under sequence parallelism."""
    parallel, capacity = recipe.parallel, recipe.packing.capacity
    pieces = parallel.cp * parallel.tp
    if capacity % pieces:
        yield (
            f"packing.capacity = {capacity}: the stream is cut into {pieces} equal pieces (tp {parallel.tp}, "
            f"cp {parallel.cp}); the nearest possible is {max(1, round(capacity / pieces)) * pieces}"
        )


def _too_many_replicas(recipe: Recipe, dp: int) -> Iterator[str]:
    """Every data-parallel rank needs a share of every step."""
    shares = {
        "pretrain.batch_size": (recipe.pretrain.steps, recipe.pretrain.batch_size),
        "anneal.batch_size": (recipe.anneal.steps, recipe.anneal.batch_size),
        "distill.batch_size": (recipe.distill.steps, recipe.distill.batch_size),
        "bpo.prompts": (recipe.bpo.steps, recipe.bpo.prompts),
    }
    for setting, (steps, share) in shares.items():
        if steps and share < dp:
            yield (
                f"{setting} = {share}: less than one for each of the {dp} data-parallel ranks; take {dp} or more, or "
                "spend ranks on tp, pp or cp"
            )


def _parts(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    """Names of parts that have learning rates of their own or are frozen."""
    parts: tuple[str, ...] = getattr(shape, "parts", ())
    if not parts:
        return
    for setting, prefix in _prefixes(recipe):
        first = prefix.split(".")[0]
        if first not in parts:
            close = difflib.get_close_matches(first, parts, 1, 0.5)
            meant = f"did you mean {close[0]}? " if close else ""
            yield f"{setting} names {prefix!r}: {meant}The parts of this model are {', '.join(parts)}"


def _prefixes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(setting, prefix) of the stages that have steps."""
    stages = {
        "pretrain": (recipe.pretrain.steps, recipe.pretrain.optim, []),
        "anneal": (recipe.anneal.steps, recipe.anneal.optim, []),
        "distill": (recipe.distill.steps, recipe.distill.optim, []),
        "bpo": (recipe.bpo.steps, recipe.bpo.optim, recipe.bpo.freeze),
    }
    for name, (steps, optim, frozen) in stages.items():
        given = {"optim.lr_scale": optim.lr_scale, "optim.constant": optim.constant, "freeze": frozen}
        for setting, prefixes in given.items():
            yield from ((f"{name}.{setting}", prefix) for prefix in prefixes if steps)
