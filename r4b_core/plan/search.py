"""All layouts of a number of GPUs: which are possible, which fit, which is fastest, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from r4b_core.config.load import RecipeError
from r4b_core.config.recipe import Recipe
from r4b_core.plan.cost import StepTime, step_time
from r4b_core.plan.machine import GPU
from r4b_core.plan.memory import Memory, worst_stage
from r4b_core.plan.recipe import StagePlan
from r4b_core.plan.shapes import ModelShape
from r4b_core.plan.work import Layout, Recompute

# Chunks of a stage that are tried: each one more message per micro-batch and stage for a smaller share of the bubble.
MOST_CHUNKS = 6


@dataclass(frozen=True)
class Candidate:
    """A possible layout with what it needs at worst over the stages, and what each stage's step takes."""

    layout: Layout
    recompute: Recompute
    memory: Memory
    fullest_stage: str
    times: dict[str, StepTime]
    hours: float


@dataclass(frozen=True)
class Plan:
    """Layouts that fit, fastest first; those that do not, nearest first; and those that cannot be, with the rule."""

    fitting: list[Candidate]
    too_large: list[Candidate]
    impossible: dict[str, str]


def nearest(value: int, allowed: Sequence[int]) -> int:
    """The allowed value closest to ``value``, the smaller of two."""
    return min(allowed, key=lambda other: (abs(other - value), other))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _indivisible(setting: str, value: int, number: int, what: str) -> str | None:
    if number % value == 0:
        return None
    return f"{setting} = {value}: does not divide the {number} {what}; the nearest that does is " + str(
        nearest(value, divisors(number))
    )


def _chunks(layout: Layout, shape: ModelShape) -> str | None:
    """What the chunks of stages need; the stages themselves divide the layers."""
    layers, chunks = shape.decoder.num_layers, layout.pp * layout.interleave
    if layout.interleave > 1 and layout.pp == 1:
        return f"parallel.virtual_stages = {layout.interleave}: interleaves pipeline stages, pp is 1; the nearest is 1"
    if layers % chunks:
        within = layers // layout.pp
        return _indivisible("parallel.virtual_stages", layout.interleave, within, f"layers of a stage (pp {layout.pp})")
    needed = shape.vision.deepstack if shape.vision else 0
    if layers // chunks < needed:
        allowed = [d for d in divisors(layers) if layers // d >= needed]
        setting = "parallel.pp * virtual_stages" if layout.interleave > 1 else "parallel.pp"
        return (
            f"{setting} = {chunks}: the first part has {layers // chunks} of {layers} layers, and DeepStack adds to "
            f"the first {needed}, which must lie with the vision tower; the nearest possible is "
            f"{nearest(chunks, allowed)}"
        )
    return None


def problems(layout: Layout, shape: ModelShape, capacity: int, gpu: GPU) -> list[str]:
    """Why a layout cannot be, whatever the memory: setting, value, rule and nearest choice, one string each."""
    decoder, vision = shape.decoder, shape.vision
    found = [
        _indivisible("parallel.pp", layout.pp, decoder.num_layers, "layers of the decoder") or _chunks(layout, shape),
        _indivisible("parallel.tp", layout.tp, decoder.num_heads, "attention heads"),
        _indivisible("parallel.tp", layout.tp, decoder.num_kv_heads, "key-value heads"),
        _indivisible("parallel.tp", layout.tp, decoder.vocab_size, "entries of the vocabulary"),
    ]
    if vision is not None:
        found.append(_indivisible("parallel.tp", layout.tp, vision.num_heads, "attention heads of the vision tower"))
    if layout.tp > gpu.per_node:
        found.append(
            f"parallel.tp = {layout.tp}: leaves the NVLink of a node of {gpu.per_node} GPUs; the nearest that does not "
            f"is {gpu.per_node}"
        )
    heads, kv = decoder.num_heads // layout.tp, decoder.num_kv_heads // layout.tp
    if layout.cp > 1 and heads and kv and (heads % layout.cp or kv % layout.cp):
        allowed = [d for d in divisors(kv) if heads % d == 0]
        found.append(
            f"parallel.cp = {layout.cp}: context parallelism gives each rank whole heads, and a tensor-parallel rank "
            f"has {kv} key-value and {heads} attention heads; the nearest that divides both is "
            f"{nearest(layout.cp, allowed)}"
        )
    pieces = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    if capacity % pieces:
        found.append(
            f"packing.capacity = {capacity}: does not split into {pieces} equal pieces (cp x tp with sequence "
            f"parallelism); the nearest that does is {max(1, round(capacity / pieces)) * pieces}"
        )
    return [problem for problem in found if problem]


def check_gpus(gpus: int, gpu: GPU) -> None:
    """Raises ValueError for a number that is not whole nodes."""
    if gpus < 1 or (gpus > gpu.per_node and gpus % gpu.per_node):
        below = max(1, gpus // gpu.per_node * gpu.per_node)
        close = nearest(gpus, [below, below + gpu.per_node]) if gpus > gpu.per_node else 1
        raise ValueError(f"--gpus {gpus}: must be 1 to {gpu.per_node}, or whole nodes of {gpu.per_node}; try {close}")


def check_recipe_layout(recipe: Recipe, shape: ModelShape, gpu: GPU) -> Layout:
    """The recipe's own layout, for one replica.

    Raises:
        RecipeError: it is impossible for this model on any number of GPUs.
    """
    parallel = recipe.parallel
    own = Layout(
        parallel.tp,
        parallel.pp,
        parallel.cp,
        interleave=parallel.virtual_stages,
        sequence_parallel=parallel.sequence_parallel,
    )
    if found := problems(own, shape, recipe.packing.capacity, gpu):
        raise RecipeError(f"recipe {recipe.name}", found)
    return own


def layouts(gpus: int) -> Iterator[Layout]:
    """Every split of the GPUs, with sequence parallelism wherever there is tensor parallelism."""
    for tp in divisors(gpus):
        for pp in divisors(gpus // tp):
            for cp in divisors(gpus // tp // pp):
                yield Layout(tp, pp, cp, gpus // (tp * pp * cp), sequence_parallel=tp > 1)


def interleavings(shape: ModelShape, asked: int | None) -> list[int]:
    """Numbers of chunks to try: the one that is asked for, else all that may be possible."""
    return [asked] if asked else [chunks for chunks in divisors(shape.decoder.num_layers) if chunks <= MOST_CHUNKS]


def search(
    shape: ModelShape,
    stages: Sequence[StagePlan],
    gpus: int,
    gpu: GPU,
    recompute: Sequence[Recompute],
    interleave: Sequence[int] = (1,),
) -> Plan:
    """Rank all layouts by the time of the whole recipe.

    Of each layout counts the recompute mode, and of pipelines the number of chunks, that is fastest among those that
    fit.
    """
    fitting, too_large, impossible = [], [], {}
    capacity = stages[0].capacity
    for layout in layouts(gpus):
        variants = [replace(layout, interleave=chunks) for chunks in interleave] if layout.pp > 1 else [layout]
        found = {variant: problems(variant, shape, capacity, gpu) for variant in variants}
        possible = [variant for variant in variants if not found[variant]]
        if not possible:
            impossible[str(layout)] = found[variants[0]][0]
            continue
        made = [candidate(shape, stages, variant, gpu, mode) for variant in possible for mode in recompute]
        fits = [one for one in made if one.memory.fits(gpu)]
        if fits:
            fitting.append(min(fits, key=lambda one: one.hours))
        else:
            too_large.append(min(made, key=lambda one: one.memory.total))
    fitting.sort(key=lambda one: (one.hours, one.memory.total))
    too_large.sort(key=lambda one: one.memory.total)
    return Plan(fitting, too_large, impossible)


def candidate(
    shape: ModelShape, stages: Sequence[StagePlan], layout: Layout, gpu: GPU, recompute: Recompute
) -> Candidate:
    times, needs, hours = {}, {}, 0.0
    for stage in stages:
        execution = replace(stage.execution, recompute=recompute)
        needs[stage.name] = worst_stage(shape, layout, execution, stage.fullest(layout.dp))
        times[stage.name] = step_time(shape, layout, execution, stage.work(layout.dp), gpu)
        hours += stage.steps * times[stage.name].total / 3600
    fullest = max(needs, key=lambda name: needs[name].total)
    return Candidate(layout, recompute, needs[fullest], fullest, times, hours)


def why_too_large(one: Candidate, gpu: GPU) -> str:
    """What a layout lacks and which part weighs most."""
    parts = {name: size for name, size in vars(one.memory).items() if size > 0}
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    heavy = ", ".join(f"{name} {parts[name] / 1e9:.1f}" for name in largest)
    lacking = (one.memory.total - gpu.memory) / 1e9
    return (
        f"{one.layout}: needs {one.memory.total / 1e9:.1f} GB of {gpu.memory / 1e9:.1f} in {one.fullest_stage} with "
        f"recompute {one.recompute}, {lacking:.1f} too much ({heavy})"
    )
