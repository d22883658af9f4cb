"""`r4b convert`: checkpoints in from Hugging Face and out to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(no_args_is_help=True, help="Convert checkpoints from and to Hugging Face's format.")

To = Annotated[Path, typer.Option("--to", help="The folder to write; it must not exist. Start again to go on.")]


class Init(StrEnum):
    checkpoint = "checkpoint"
    from_parts = "from-parts"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("to-megatron")
def to_megatron(
    to: To,
    source: Annotated[
        Path | None, typer.Option("--from", help="A Hugging Face checkpoint: Qwen3-VL or R-4B, in safetensors.")
    ] = None,
    init: Annotated[
        Init, typer.Option(help="from-parts joins --vision and --language to an R-4B with a random projector.")
    ] = Init.checkpoint,
    vision: Annotated[Path | None, typer.Option(help="from-parts: a SigLIP2 checkpoint.")] = None,
    language: Annotated[Path | None, typer.Option(help="from-parts: a Qwen3 checkpoint.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="from-parts: of the projector.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="from-parts: of the weights. (default: --language's)")] = None,
) -> None:
    """Make a folder that model.init_from takes, from a Hugging Face checkpoint.

    Weights keep their type, bit for bit; tokenizer and processor files are carried along.
    """
    given = {"--from": source, "--vision": vision, "--language": language}
    needed = ("--vision", "--language") if init is Init.from_parts else ("--from",)
    present = [name for name, value in given.items() if value is not None]
    if sorted(present) != sorted(needed):
        raise typer.BadParameter(f"--init {init} takes {' and '.join(needed)}, not {' and '.join(present) or 'none'}")

    from r4b_core.cli.output import say
    from r4b_core.parallel import device

    device.activate()  # before anything imports Megatron-Core

    if source is not None:
        from r4b_core.models.convert import to_megatron

        with progress() as on_progress:
            model = to_megatron(source, to, on_progress=on_progress)
    else:
        from r4b_core.models.convert.parts import from_parts

        assert vision is not None and language is not None
        with progress() as on_progress:
            model = from_parts(
                vision, language, to, seed=seed, dtype=dtype.value if dtype else None, on_progress=on_progress
            )
    say(f"{to}: {model.family}, size {model.size}, {model.dtype}")
    settings = {"family": model.family, "size": model.size, **({"shape": model.shape} if model.shape else {})}
    settings |= {"dtype": model.dtype, **({"processor": model.processor} if model.processor else {})}
    say(_as_yaml({"model": {**settings, "init_from": str(to.resolve())}}))


@app.command("to-hf")
def to_hf(
    source: Annotated[
        Path, typer.Option("--from", help="A run folder, one of its step_* checkpoints, or a folder of to-megatron.")
    ],
    to: To,
    like: Annotated[
        Path | None,
        typer.Option(help="A folder of the same model with config.json and tokenizer. (default: where the run's are)"),
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Gigabytes of one safetensors file, about.")] = 5.0,
) -> None:
    """Make a Hugging Face checkpoint, which transformers and vLLM read, from a trained or converted one."""
    from r4b_core.cli.output import say
    from r4b_core.parallel import device

    device.activate()  # before anything imports Megatron-Core

    from r4b_core.models.convert import find_like, to_huggingface
    from r4b_core.models.convert.run import read_recipe
    from r4b_core.telemetry.locate import locate

    checkpoint, recipe = locate(source)
    model = read_recipe(recipe)
    folder = find_like(recipe.parent, model, like)
    with progress() as on_progress:
        to_huggingface(checkpoint, model, folder, to, shard_bytes=int(shard_size * 1e9), on_progress=on_progress)
    say(f"{to}: {model.family}, size {model.size}, configuration and tokenizer of {folder}")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is done, on standard error; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description:<9}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[size]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            size = f"{total / 1e9:.2f} GB" if what == "writing" else f"{total} files"
            if what not in tasks:
                tasks[what] = bar.add_task(what, size=size)
            bar.update(tasks[what], completed=done, total=total, size=size)

        yield on_progress


def _as_yaml(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=120).rstrip()
