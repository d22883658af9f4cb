"""`r4b doctor`: what this machine has, what is missing and what that costs."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated

import typer

from r4b_core.cli.arguments import Overrides

if TYPE_CHECKING:
    import torch
    from rich.console import Console

OPTIONAL = {
    "triton": "Triton kernels; comes with torch on a GPU machine",
    "flash-attn": "FlashAttention 2, a rival in the benchmarks",
    "flash-attn-4": "FlashAttention 4, the rival on Hopper and Blackwell",
    "liger-kernel": "a rival in the benchmarks",
    "cut-cross-entropy": "a rival in the benchmarks",
    "transformer-engine": "a fused Adam for the distributed optimizer",
    "vllm": "rollouts at scale",
    "nvidia-dali-cuda120": "image decoding on the GPU",
    "ray": "curation across machines",
    "tensorboard": "metrics in TensorBoard",
    "wandb": "metrics in Weights & Biases",
    "trackio": "metrics in a local dashboard",
    "lmms-eval": "public benchmarks",
}

ENVIRONMENT = {
    "RANK": "this process's rank (torchrun sets it)",
    "LOCAL_RANK": "its rank on this machine, which picks the GPU (torchrun)",
    "WORLD_SIZE": "how many ranks there are (torchrun)",
    "MASTER_ADDR": "where the ranks meet (torchrun)",
    "MASTER_PORT": "the port there (torchrun)",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1 unless set: Megatron-Core's overlap of compute and communication relies on it",
    "OMP_NUM_THREADS": "CPU threads of each rank (read by torch)",
    "R4B_BUILD_CUDA": "auto, 0 or 1: whether r4b_kernels.build compiles the CUDA sources (auto: nvcc and a CUDA torch)",
    "CXX": "the C++ compiler of r4b_kernels.build (g++, else clang++, unless set)",
    "CUDA_HOME": "where r4b_kernels.build looks for nvcc first",
    "CUDA_PATH": "where it looks next, before PATH",
    "XDG_CACHE_HOME": "where compiled objects go if the package's folder is not writable (~/.cache unless set)",
    "TRITON_INTERPRET": "1 runs Triton's kernels on the CPU, for tests (read by triton)",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used (read by CUDA)",
}


def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Also check that this recipe fits.")] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to check the recipe for. (default: the GPUs here, or 1)")
    ] = None,
) -> None:
    """Check this machine: versions, devices, kernel backends, optional packages. Exits 1 if something is missing."""
    import torch

    from r4b_core.cli.output import console
    from r4b_core.parallel import device

    device.activate()
    out = console()
    missing = _packages(out)
    _machine(out, torch.device(device.device().type))
    missing += _communication(out)
    missing += _kernels(out, torch.device(device.device().type))
    _environment(out)
    if recipe is not None:
        _recipe(out, recipe, overrides or [], ranks or max(1, torch.cuda.device_count()))
    if missing:
        out.print(f"\n[red]missing:[/] {', '.join(missing)}")
        raise typer.Exit(1)
    out.print("\n[green]nothing required is missing[/]")


def _packages(out: Console) -> list[str]:
    """Prints required and optional packages; returns the required ones that are missing or of another version."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.markup import escape

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    missing = []
    out.print("[bold]required[/]")
    out.print(f"  python {platform.python_version()}")
    for requirement in _requirements():
        found = installed(requirement.name)
        if found is None:
            verdict = "[red]not installed[/]"
        elif not requirement.specifier.contains(found, prereleases=True):
            verdict = f"[red]{found}, needs {requirement.specifier}[/]"
        else:
            out.print(f"  {requirement.name} {found}")
            continue
        missing.append(requirement.name)
        out.print(f"  {requirement.name} {verdict}")
    out.print("[bold]optional[/]")
    for name, gives in OPTIONAL.items():
        out.print(f"  {name}: {installed(name) or 'not installed'} [dim]({escape(gives)})[/]")
    return missing


def _requirements() -> list:
    """The base dependencies: of the checkout's pyproject.toml, else of the installed package."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires
    from pathlib import Path

    from packaging.requirements import Requirement

    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        try:
            lines = requires("r4b") or []
        except PackageNotFoundError:
            lines = []
    return [made for made in map(Requirement, lines) if made.marker is None or made.marker.evaluate({"extra": ""})]


def _machine(out: Console, device: torch.device) -> None:
    import shutil

    import psutil
    import torch

    from r4b_core.telemetry.environment import describe_environment

    hardware = describe_environment()["hardware"]
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(".")
    out.print("[bold]machine[/]")
    out.print(f"  {hardware['system']}, {hardware['cores']} cores ({hardware['cpu']})")
    out.print(f"  memory: {memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB")
    out.print(f"  disk here: {disk.free / 1e9:.1f} GB free")
    if device.type != "cuda":
        out.print("  no GPU that torch can use: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        out.print(f"  GPU {index}: {properties.name}, {properties.total_memory / 1e9:.1f} GB, {capability}")


def _communication(out: Console) -> list[str]:
    import torch
    import torch.distributed as dist

    needed = {"gloo": dist.is_available() and dist.is_gloo_available()}
    if torch.cuda.is_available():
        needed["nccl"] = dist.is_available() and dist.is_nccl_available()
    out.print("[bold]communication[/]")
    for name, there in needed.items():
        out.print(f"  {name}: {'available' if there else '[red]not in this torch[/]'}")
    return [name for name, there in needed.items() if not there]


def _kernels(out: Console, device: torch.device) -> list[str]:
    """Prints every op's backends; returns the ops that could not be imported."""
    from rich.markup import escape
    from rich.table import Table

    import r4b_kernels
    from r4b_kernels import dispatch

    broken = []
    for module in pkgutil.iter_modules(r4b_kernels.__path__, "r4b_kernels."):
        if not module.ispkg:
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            broken.append(f"{module.name} ({error})")
    table = Table(title=f"kernels on {device.type}", title_justify="left", title_style="bold", box=None)
    for column in ("op", "backend", ""):
        table.add_column(column)
    for op, backend, reason in dispatch.table(device):
        table.add_row(op, backend, escape(reason), style="bold" if reason == "chosen" else "dim")
    out.print(table)
    return broken


def _environment(out: Console) -> None:
    import os

    from rich.markup import escape

    out.print("[bold]environment variables[/] [dim](there are no others)[/]")
    for name, meaning in ENVIRONMENT.items():
        out.print(f"  {name}={escape(os.environ.get(name, ''))} [dim]{escape(meaning)}[/]")


def _recipe(out: Console, name: str, overrides: list[str], ranks: int) -> None:
    from r4b_core.cli.layout import fit
    from r4b_core.config.load import load_recipe

    recipe = load_recipe(name, overrides).recipe
    out.print(f"[bold]recipe {recipe.name}[/]\n  fits {ranks} rank(s): {fit(recipe, ranks)}")
