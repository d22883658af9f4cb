"""Can a recipe run on a machine? Every reason why not, found without starting a rank or reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r4b_core.config.recipe import Recipe

# Compute capability from which on GPUs multiply in bfloat16.
_BFLOAT16 = (8, 0)
# The optimizer's master copy and two moments, float32 each; a float32 weight is its own master copy.
_OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}


@dataclass(frozen=True)
class GPU:
    """Bytes of memory, all and free; ``capability`` is (major, minor)."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What of a machine decides whether a recipe can run. Bytes; ``gpus`` empty: everything runs on the CPU."""

    gpus: tuple[GPU, ...]
    memory: int
    free: int
    disk_free: Callable[[Path], int]
    has_package: Callable[[str], bool]


@dataclass
class Verdict:
    """What was found out about a recipe; it can run if there are no problems.

    Attributes:
        facts: what is good to know, by name.
        problems: each naming setting, value, reason and way out.
        unknown: what could not be checked, and why.
    """

    ranks: int
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def examine(recipe: Recipe, ranks: int, machine: Machine) -> Verdict:
    """All checks of a recipe for so many ranks, of which this machine runs as many as it has GPUs (a CPU: all)."""
    verdict = Verdict(ranks)
    dp = _layout(recipe, verdict)
    _dtype(recipe, machine, verdict)
    parameters = _memory(recipe, machine, dp, verdict)
    _files(recipe, verdict)
    if parameters:
        _disk(recipe, machine, parameters, verdict)
    for package in sorted(set(recipe.telemetry.loggers)):
        if not machine.has_package(package):
            verdict.problems.append(
                f"telemetry.loggers: {package} is not installed; pip install {package}, or leave it out"
            )
    if recipe.data.decoder == "dali" and not machine.has_package("nvidia-dali-cuda120"):
        verdict.problems.append(
            "data.decoder = dali: nvidia-dali-cuda120 is not installed; pip install 'r4b[dali]', or take pillow"
        )
    return verdict


def _layout(recipe: Recipe, verdict: Verdict) -> int:
    """Data-parallel replicas, or 1 where the layout does not fit."""
    from r4b_core.cli.layout import fit
    from r4b_core.config.load import RecipeError

    try:
        layout = fit(recipe, verdict.ranks)
    except RecipeError as error:
        verdict.problems += error.problems
        return 1
    verdict.facts["layout"] = f"{layout} on {verdict.ranks} rank(s)"
    return layout.dp


def _dtype(recipe: Recipe, machine: Machine, verdict: Verdict) -> None:
    if recipe.model.dtype != "bfloat16":
        return
    for number, gpu in enumerate(machine.gpus):
        if gpu.capability < _BFLOAT16:
            verdict.problems.append(
                f"model.dtype = bfloat16: GPU {number} ({gpu.name}) has compute capability "
                f"{gpu.capability[0]}.{gpu.capability[1]} and bfloat16 needs 8.0; take float32 or another GPU"
            )


def _memory(recipe: Recipe, machine: Machine, dp: int, verdict: Verdict) -> int:
    """Compares `r4b plan`'s numbers with the machine; returns the model's parameters, 0 where plan does not know it."""
    from r4b_core.plan.memory import Memory, worst_stage
    from r4b_core.plan.recipe import Assumptions, model_shape, stage_plans
    from r4b_core.plan.work import Layout

    parallel = recipe.parallel
    try:
        shape = model_shape(recipe.model)
        stages = stage_plans(recipe, shape, Assumptions())
    except ValueError as error:
        verdict.unknown.append(f"memory: {error}")
        return 0
    layout = Layout(parallel.tp, parallel.pp, parallel.cp, dp, sequence_parallel=parallel.sequence_parallel)
    needs: dict[str, Memory] = {
        stage.name: worst_stage(
            shape, layout, replace(stage.execution, recompute=parallel.recompute), stage.fullest(layout.dp)
        )
        for stage in stages
    }
    fullest = max(needs, key=lambda name: needs[name].total)
    parts = {name: size for name, size in vars(needs[fullest]).items() if size > 0}
    heavy = ", ".join(f"{name} {parts[name] / 1e9:.1f}" for name in sorted(parts, key=lambda name: -parts[name])[:3])
    if machine.gpus:
        need, all_of_it, free, where = needs[fullest].total, *_least(machine.gpus)
        what = f"{need / 1e9:.1f} GB per GPU"
    else:
        # What `total` adds is CUDA's; the ranks share the host.
        need, all_of_it, free, where = sum(parts.values()) * verdict.ranks, machine.memory, machine.free, "the host"
        what = f"{need / 1e9:.1f} GB" if verdict.ranks == 1 else f"{need / 1e9:.1f} GB for {verdict.ranks} ranks"
    what += f" in {fullest} by r4b plan (of each: {heavy})"
    verdict.facts["memory"] = f"{what}; {where} has {free / 1e9:.1f} GB free"
    if need > free:
        lacking = f"has {all_of_it / 1e9:.1f} GB"
        if need <= all_of_it:
            lacking = f"has {free / 1e9:.1f} of its {all_of_it / 1e9:.1f} GB free: end what holds the rest"
        verdict.problems.append(
            f"memory: needs {what} and {where} {lacking}; r4b plan {recipe.name} --gpus N ranks layouts that fit"
        )
    return shape.parameters


def _least(gpus: tuple[GPU, ...]) -> tuple[int, int, str]:
    number = min(range(len(gpus)), key=lambda index: gpus[index].free)
    return gpus[number].memory, gpus[number].free, f"GPU {number}"


def _files(recipe: Recipe, verdict: Verdict) -> None:
    from r4b_core.data.files import RecordFiles
    from r4b_core.models.processor import processor_of
    from r4b_core.telemetry.locate import locate

    def check(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except (ValueError, OSError) as error:
            verdict.problems.append(str(error))
            return None

    if processor := check(lambda: processor_of(recipe.model, recipe.data)):
        verdict.facts["tokenizer"] = f"{processor.tokenizer.vocab_size:,} tokens"
        if limits := "; ".join(_pixels(recipe)):
            verdict.facts["images"] = limits
    if (start := recipe.model.init_from) is not None:
        try:
            verdict.facts["starts from"] = str(locate(Path(start))[0])
        except ValueError as error:
            verdict.problems.append(f"model.init_from = {start}: {error}")
    if recipe.data.task != "records":
        return
    for setting, patterns in {"train": recipe.data.train, "held_out_files": recipe.data.held_out_files}.items():
        if patterns and (found := check(lambda p=patterns, s=setting: RecordFiles(p, f"data.{s}"))):
            verdict.facts[f"data.{setting}"] = f"{found.rows:,} records in {len(found.files)} file(s)"


def _pixels(recipe: Recipe) -> Iterator[str]:
    """What the processor makes of images."""
    model, data = recipe.model, recipe.data
    if model.processor is None:
        return
    if model.family == "qwen3_vl":
        from r4b_core.models.qwen3_vl.processing import read_settings

        images = read_settings(model.processor)
        least, most = data.min_pixels or images.min_pixels, data.max_pixels or images.max_pixels
        block = images.patch_size * images.merge_size
        yield f"scaled to {least:,} .. {most:,} pixels, at most {most // block**2:,} tokens each"
    else:
        from r4b_core.models.families import resolve
        from r4b_core.models.r4b.processing import read_settings as read_tiles

        tiles = read_tiles(model.processor, resolve(model).patch_size)
        height, width = max(tiles.sizes, key=lambda size: size[0] * size[1])
        yield f"tiles of {tiles.tile_size} x {tiles.tile_size} pixels, grids up to {height} x {width}"


def _disk(recipe: Recipe, machine: Machine, parameters: int, verdict: Verdict) -> None:
    folder = Path("runs") / recipe.name
    while not folder.exists():
        folder = folder.parent
    per_parameter = {"bfloat16": 2, "float32": 4}[recipe.model.dtype] + _OPTIMIZER_BYTES[recipe.model.dtype]
    one, free = parameters * per_parameter, machine.disk_free(folder)
    # A new checkpoint is complete before an old one goes.
    need = one * (recipe.checkpoint.keep + 1)
    verdict.facts["checkpoints"] = f"{one / 1e9:.1f} GB each; {free / 1e9:.1f} GB free in {folder.resolve()}"
    if need > free:
        verdict.problems.append(
            f"checkpoint.keep = {recipe.checkpoint.keep}: with the one being written, checkpoints take "
            f"{need / 1e9:.1f} GB and {folder.resolve()} has {free / 1e9:.1f} free; keep fewer, or give --run-dir on a "
            "larger disk"
        )
