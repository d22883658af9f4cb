"""`r4b plan`: which layout a recipe should have on some GPUs, what it needs and how long it will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from r4b_core.cli.arguments import Overrides, RecipeName

if TYPE_CHECKING:
    from rich.console import Console

    from r4b_core.plan.machine import GPU
    from r4b_core.plan.recipe import Assumptions, StagePlan
    from r4b_core.plan.search import Candidate, Plan
    from r4b_core.plan.shapes import ModelShape

UNMEASURED = (
    "r4b has not been measured on GPUs: these are predictions of a cost model, checked against what other trainers "
    "published (docs/plan.md)."
)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs there are.")] = 8,
    gpu: Annotated[Literal["h100", "h200"], typer.Option(help="Which.")] = "h100",
    recompute: Annotated[
        Literal["auto", "none", "selective", "full"] | None,
        typer.Option(help="What the backward recomputes; auto tries all. (default: the recipe's, else auto)"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Plan another model's shape, such as qwen3_vl-8b.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a sample (BPO: of a prompt), mean.")] = 256,
    images: Annotated[int, typer.Option(min=0, help="Images of a sample.")] = 1,
    patches: Annotated[
        int | None, typer.Option(min=4, help="ViT patches of an image. (default: one base view, or 1024)")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a rollout, mean. (default: bpo.max_new_tokens)")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to list.")] = 8,
) -> None:
    """Predict memory and step time of a recipe on GPUs, and rank its layouts. Exits 1 if none fits."""
    from r4b_core.cli.output import console
    from r4b_core.config.load import load_recipe
    from r4b_core.plan.machine import GPUS
    from r4b_core.plan.recipe import Assumptions, model_shape, named_shape, stage_plans
    from r4b_core.plan.search import check_gpus, check_recipe_layout, interleavings, search
    from r4b_core.plan.work import RECOMPUTE

    machine = GPUS[gpu]
    check_gpus(gpus, machine)
    resolved = load_recipe(recipe, overrides or ())
    read = resolved.recipe
    given = {key: resolved.origins[f"parallel.{key}"] != "default" for key in ("recompute", "virtual_stages")}
    shape = named_shape(model) if model else model_shape(read.model)
    check_recipe_layout(read, shape, machine)
    assumed = Assumptions(text_tokens, images, patches, response_tokens)
    stages = stage_plans(read, shape, assumed)
    mode = recompute or (read.parallel.recompute if given["recompute"] else "auto")
    chunks = interleavings(shape, read.parallel.virtual_stages if given["virtual_stages"] else None)
    made = search(shape, stages, gpus, machine, RECOMPUTE if mode == "auto" else (mode,), chunks)

    out = console()
    _header(out, read.name, shape, stages, assumed, gpus, machine)
    if made.fitting:
        _memory(out, made.fitting[0], machine)
        _time(out, made.fitting[0], stages)
        _ranking(out, made.fitting, stages, top)
    _others(out, made, machine, top)
    if recompute not in (None, read.parallel.recompute):
        out.print(f"[yellow]the recipe says parallel.recompute = {read.parallel.recompute}; this plan asks what if[/]")
    elif mode != "auto":
        out.print(f"[dim]parallel.recompute = {mode}, as the recipe says; --recompute auto asks what if[/]")
    if given["virtual_stages"]:
        out.print(f"[dim]parallel.virtual_stages = {read.parallel.virtual_stages} in pipelines, as the recipe says[/]")
    out.print(f"[dim]{UNMEASURED}[/]")
    if not made.fitting:
        _nothing_fits(out, made, machine)
        raise typer.Exit(1)


def _header(
    out: Console,
    name: str,
    shape: ModelShape,
    stages: list[StagePlan],
    assumed: Assumptions,
    gpus: int,
    gpu: GPU,
) -> None:
    out.print(f"[bold]{name}[/]: {shape.name}, {shape.parameters / 1e9:.3f} B parameters, on {gpus} x {gpu.name}")
    for stage in stages:
        work = stage.whole
        text = f"  {stage.name}: {stage.steps} steps of {work.tokens:,.0f} tokens ({stage.samples} samples"
        if work.responses:
            text += f", {work.responses:,.0f} responses of {work.response_tokens:,.0f}"
        if work.patches:
            text += f", {work.patches:,.0f} patches"
        out.print(text + f"; micro-batches of at most {stage.capacity:,})")
    out.print(
        f"  assumed: {assumed.text_tokens} text tokens and {assumed.images} image(s) a sample"
        " [dim](--text-tokens, --images, --patches, --response-tokens)[/]\n"
    )


def _memory(out: Console, best: Candidate, gpu: GPU) -> None:
    from rich.table import Table

    out.print(f"[bold]memory per GPU[/] in {best.fullest_stage}, {best.layout}, recompute {best.recompute}")
    table = Table(box=None)
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, size in vars(best.memory).items():
        table.add_row(name, f"{size / 1e9:.2f}")
    rest = best.memory.total - sum(vars(best.memory).values())
    table.add_row("CUDA, NCCL, fragments", f"{rest / 1e9:.2f}")
    table.add_row("total", f"{best.memory.total / 1e9:.2f} of {gpu.memory / 1e9:.1f}", style="bold")
    out.print(table)
    out.print()


def _time(out: Console, best: Candidate, stages: list[StagePlan]) -> None:
    from rich.table import Table

    out.print(f"[bold]seconds per step[/], {best.layout}, recompute {best.recompute}")
    table = Table(box=None)
    table.add_column("part")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    names = dict.fromkeys(name for stage in stages for name in best.times[stage.name].parts)
    for name in names:
        cells = (best.times[stage.name].parts.get(name) for stage in stages)
        table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    table.add_row("step", *(f"{best.times[stage.name].total:.4f}" for stage in stages), style="bold")
    out.print(table)
    out.print()


def _ranking(out: Console, fitting: list[Candidate], stages: list[StagePlan], top: int) -> None:
    from rich.table import Table

    out.print(f"[bold]{len(fitting)} layout(s) fit[/], fastest first")
    table = Table(box=None)
    for column in ("", "layout", "recompute"):
        table.add_column(column)
    table.add_column("GB", justify="right")
    for stage in stages:
        table.add_column(f"{stage.name} s/step", justify="right")
        table.add_column("tokens/s/GPU", justify="right")
    table.add_column("whole recipe", justify="right")
    for place, one in enumerate(fitting[:top], 1):
        row = [str(place), str(one.layout), one.recompute, f"{one.memory.total / 1e9:.1f}"]
        for stage in stages:
            seconds = one.times[stage.name].total
            row += [f"{seconds:.3f}", f"{stage.whole.tokens / seconds / one.layout.gpus:,.0f}"]
        table.add_row(*row, duration(one.hours), style="bold" if place == 1 else "")
    out.print(table)
    out.print()


def duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"


def _others(out: Console, made: Plan, gpu: GPU, top: int) -> None:
    from rich.markup import escape

    from r4b_core.plan.search import why_too_large

    if made.too_large:
        out.print(f"[bold]{len(made.too_large)} layout(s) do not fit[/]")
        for one in made.too_large[:top]:
            out.print(f"  {escape(why_too_large(one, gpu))}")
    if made.impossible:
        reasons: dict[str, int] = {}
        for reason in made.impossible.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        out.print(f"[bold]{len(made.impossible)} layout(s) are impossible[/]")
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])[:top]:
            out.print(f"  {count} x {escape(reason)}")
    if made.too_large or made.impossible:
        out.print()


def _nothing_fits(out: Console, made: Plan, gpu: GPU) -> None:
    from rich.markup import escape

    from r4b_core.plan.search import why_too_large

    if not made.too_large:
        out.print("[red]nothing fits:[/] no split of these GPUs is possible for this model")
        return
    parts = vars(made.too_large[0].memory)
    heaviest = max(parts, key=lambda name: parts[name])
    states = heaviest in ("weights", "gradients", "optimizer")
    advice = "more GPUs, or freeze a part" if states else "a smaller packing.capacity, --recompute full, or more GPUs"
    out.print(f"[red]nothing fits:[/] nearest is {escape(why_too_large(made.too_large[0], gpu))}; try {advice}")
