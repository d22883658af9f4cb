"""`r4b doctor`: what this machine has, what is missing and what that costs, and whether a recipe can run here."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r4b_core.cli.arguments import Overrides

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from r4b_core.cli.checks import Machine, Verdict

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

# Where there is less, what the note says happens.
SHARED_MEMORY = 2**30
FILES = 4096
# transformers' patch embedding may take so many times as long as a linear of the same size before it is called slow.
CONV3D_RATIO = 4.0


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Also say whether this recipe can run here.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to check the recipe for. (default: the GPUs here, or 1)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: versions, devices, kernels, limits. Exits 1 if it lacks anything or cannot run a recipe."""
    from r4b_core.cli.output import console, is_main_rank
    from r4b_core.config.load import load_recipe
    from r4b_core.parallel import device

    asked = load_recipe(recipe, overrides or []).recipe if recipe is not None else None
    device.activate()
    place = device.device()
    here = machine()
    report: dict[str, Any] = {
        "required": required(),
        "optional": {name: _installed(name) for name in OPTIONAL},
        "machine": facts(here),
        "communication": communication(),
        "kernels": kernels(place),
        "environment": _environment(),
    }
    report["notes"] = notes(report, here)
    report["missing"] = [
        *(name for name, found in report["required"].items() if found["problem"]),
        *(name for name, there in report["communication"].items() if there is False),
        *report["kernels"]["broken"],
    ]
    verdict = None
    if asked is not None:
        from r4b_core.cli.checks import examine

        verdict = examine(asked, ranks or max(1, len(here.gpus)), here)
        report["recipe"] = {"name": asked.name, "can_run": not verdict.problems, **vars(verdict)}
    if not as_json:
        _print(console(), report, place, verdict)
    elif is_main_rank():
        print(json.dumps(report, indent=1, ensure_ascii=False), flush=True)
    if report["missing"] or (verdict is not None and verdict.problems):
        raise typer.Exit(1)


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def required() -> dict[str, dict[str, str | None]]:
    """The base dependencies: the version found, and what is wrong with it, if anything."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in _requirements():
        version = _installed(requirement.name)
        problem = None
        if version is None:
            problem = "not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            problem = f"{version}, needs {requirement.specifier}"
        found[requirement.name] = {"version": version, "problem": problem}
    return found


def _requirements() -> list:
    """The base dependencies: of the checkout's pyproject.toml, else of the installed package."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires

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


def machine() -> Machine:
    """This machine's devices and memory."""
    import shutil

    import psutil
    import torch

    from r4b_core.cli.checks import GPU, Machine

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, memory = torch.cuda.mem_get_info(index)
        gpus.append(GPU(properties.name, memory, free, (properties.major, properties.minor)))
    memory = psutil.virtual_memory()
    return Machine(
        tuple(gpus),
        memory.total,
        memory.available,
        lambda folder: shutil.disk_usage(folder).free,
        lambda name: _installed(name) is not None,
    )


def facts(here: Machine) -> dict[str, Any]:
    """Versions and limits of the machine, JSON-ready; None for what there is not."""
    import inspect
    import platform

    import torch
    from PIL import Image

    from r4b_core.data.images import open_image
    from r4b_core.telemetry.environment import describe_environment

    hardware = describe_environment()["hardware"]
    caps = {name: value.default for name, value in inspect.signature(open_image).parameters.items()}
    return {
        "system": hardware["system"],
        "cpu": hardware["cpu"],
        "cores": hardware["cores"],
        "python": platform.python_version(),
        "memory": here.memory,
        "memory_free": here.free,
        "disk_free": here.disk_free(Path(".")),
        "shared_memory": _shared_memory(),
        "open_files": _open_files(),
        "gpus": [vars(gpu) for gpu in here.gpus],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if here.gpus else None,
        "pixels": {"pillow": Image.MAX_IMAGE_PIXELS, "image": caps["max_pixels"], "image_bytes": caps["max_bytes"]},
        "conv3d_ratio": round(conv3d_ratio(), 1),
    }


def _shared_memory() -> int | None:
    import shutil

    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _open_files() -> int | None:
    """The soft limit, which this process may not exceed; None where there is no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """NVIDIA's kernel module, whether or not torch can use it."""
    import re

    try:
        found = re.search(r"Kernel Module\D*?([\d.]+)", path.read_text(errors="replace").replace("x86_64", ""))
    except OSError:
        return None
    return found[1] if found else None


def conv3d_ratio(patches: int = 256) -> float:
    """How many times as long as a linear of the same weights transformers' Qwen3-VL patch embedding takes, in bfloat16.

    It is a Conv3d whose window is its stride. Some pairs of torch and cuDNN have no fast kernel for that.
    """
    import torch

    from r4b_core.parallel.device import device

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device()}
    window = (2, 16, 16)
    x = torch.zeros(patches, 3, *window, **options)
    convolution = torch.nn.Conv3d(3, 1024, window, stride=window, **options)
    linear = torch.nn.Linear(x[0].numel(), 1024, **options)
    with torch.no_grad():
        return _seconds(lambda: convolution(x)) / _seconds(lambda: linear(x.flatten(1)))


def _seconds(call: Any) -> float:
    """The shortest of three calls after one to warm up."""
    import time

    from r4b_core.parallel.device import synchronize

    taken = []
    for _ in range(4):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def communication() -> dict[str, Any]:
    """Backend -> its version where it has one, True where it is there without, False where it is missing."""
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {"gloo": dist.is_available() and dist.is_gloo_available()}
    if torch.cuda.is_available():
        there = dist.is_available() and dist.is_nccl_available()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if there else False
    return found


def kernels(device: torch.device) -> dict[str, Any]:
    """Every op's backends with the reason for or against each, and the ops that could not be imported."""
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
    table = [{"op": op, "backend": backend, "reason": reason} for op, backend, reason in dispatch.table(device)]
    return {"backends": table, "broken": broken}


def _environment() -> dict[str, str | None]:
    import os

    return {name: os.environ.get(name) for name in ENVIRONMENT}


def notes(report: dict[str, Any], here: Machine) -> list[str]:
    """What is no failure and yet costs time or ends a run."""
    found, made = report["machine"], []
    if found["driver"] and not here.gpus:
        cause = "this torch is built without CUDA" if found["cuda"] is None else "torch sees no GPU"
        made.append(f"NVIDIA's driver {found['driver']} is here and {cause}: install a CUDA build of torch to use it")
    if found["conv3d_ratio"] > CONV3D_RATIO:
        made.append(
            f"Conv3d in bfloat16 takes {found['conv3d_ratio']:.0f} times as long here as a linear of the same size: "
            "transformers' Qwen3-VL embeds patches with it and is slow; r4b uses the linear and is not"
        )
    if (shared := found["shared_memory"]) is not None and shared < SHARED_MEMORY and len(here.gpus) > 1:
        made.append(
            f"/dev/shm has {shared / 1e6:.0f} MB, and NCCL's ranks on one machine talk through it: give the container "
            "--shm-size=8g or --ipc=host"
        )
    if (files := found["open_files"]) is not None and files < FILES:
        made.append(
            f"a process may open {files} files: many ranks or many data files need more; ulimit -n {FILES} raises it"
        )
    pixels = found["pixels"]
    if pixels["pillow"] is not None and pixels["pillow"] < pixels["image"]:
        made.append(
            f"Pillow warns of images over {pixels['pillow']:,} pixels (Image.MAX_IMAGE_PIXELS), and r4b takes up to "
            f"{pixels['image']:,}"
        )
    if here.gpus and (slow := sorted(_on_reference(report["kernels"]["backends"]))):
        made.append(f"{', '.join(slow)}: only the reference serves here, which is slow; see the table of kernels")
    return made


def _on_reference(table: list[dict[str, str]]) -> set[str]:
    return {row["op"] for row in table if row["backend"] == "reference" and row["reason"] == "chosen"}


def _print(out: Console, report: dict[str, Any], place: torch.device, verdict: Verdict | None) -> None:
    from rich.markup import escape

    _print_packages(out, report)
    _print_machine(out, report["machine"])
    out.print("[bold]communication[/]")
    for name, there in report["communication"].items():
        text = there if isinstance(there, str) else "available" if there else "[red]not in this torch[/]"
        out.print(f"  {name}: {text}")
    _print_kernels(out, report["kernels"]["backends"], place)
    out.print("[bold]environment variables[/] [dim](there are no others)[/]")
    for name, value in report["environment"].items():
        out.print(f"  {name}={escape(value or '')} [dim]{escape(ENVIRONMENT[name])}[/]")
    for note in report["notes"]:
        out.print(f"[yellow]note:[/] {escape(note)}")
    if verdict is not None:
        _print_verdict(out, report["recipe"]["name"], verdict)
    if report["missing"]:
        out.print(f"\n[red]missing:[/] {escape(', '.join(report['missing']))}")
    elif verdict is not None and verdict.problems:
        name = escape(report["recipe"]["name"])
        out.print(f"\n[red]{len(verdict.problems)} reason(s) above why {name} cannot run here[/]")
    else:
        out.print("\n[green]nothing required is missing[/]")


def _print_packages(out: Console, report: dict[str, Any]) -> None:
    from rich.markup import escape

    out.print("[bold]required[/]")
    out.print(f"  python {report['machine']['python']}")
    for name, found in report["required"].items():
        out.print(f"  {name} {found['version'] if found['problem'] is None else '[red]' + found['problem'] + '[/]'}")
    out.print("[bold]optional[/]")
    for name, version in report["optional"].items():
        out.print(f"  {name}: {version or 'not installed'} [dim]({escape(OPTIONAL[name])})[/]")


def _print_machine(out: Console, found: dict[str, Any]) -> None:
    out.print("[bold]machine[/]")
    out.print(f"  {found['system']}, {found['cores']} cores ({found['cpu']})")
    out.print(f"  memory: {found['memory_free'] / 1e9:.1f} GB free of {found['memory'] / 1e9:.1f} GB")
    out.print(f"  disk here: {found['disk_free'] / 1e9:.1f} GB free")
    if found["shared_memory"] is not None:
        out.print(f"  /dev/shm: {found['shared_memory'] / 1e9:.1f} GB")
    out.print(f"  open files: {'no limit' if found['open_files'] is None else 'at most ' + str(found['open_files'])}")
    pixels = found["pixels"]
    pillow = "no number" if pixels["pillow"] is None else f"{pixels['pillow']:,}"
    most = f"at most {pixels['image']:,}, its file {pixels['image_bytes']:,} bytes"
    out.print(f"  pixels of an image: {most} (Pillow warns above {pillow})")
    out.print(
        f"  Conv3d as a patch embedding, bfloat16: {found['conv3d_ratio']} times the time of a linear "
        "[dim](transformers' Qwen3-VL has the one, r4b the other)[/]"
    )
    cuda, cudnn = found["cuda"] or "not in this torch", found["cudnn"] or "not used"
    out.print(f"  CUDA: {cuda}; cuDNN: {cudnn}; NVIDIA driver: {found['driver'] or 'none'}")
    if not found["gpus"]:
        out.print("  no GPU that torch can use: everything runs on the CPU")
    for index, gpu in enumerate(found["gpus"]):
        major, minor = gpu["capability"]
        memory = f"{gpu['free'] / 1e9:.1f} GB free of {gpu['memory'] / 1e9:.1f} GB"
        out.print(f"  GPU {index}: {gpu['name']}, {memory}, sm_{major}{minor}")


def _print_kernels(out: Console, rows: list[dict[str, str]], device: torch.device) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"kernels on {device.type}", title_justify="left", title_style="bold", box=None)
    for column in ("op", "backend", ""):
        table.add_column(column)
    for row in rows:
        style = "bold" if row["reason"] == "chosen" else "dim"
        table.add_row(row["op"], row["backend"], escape(row["reason"]), style=style)
    out.print(table)


def _print_verdict(out: Console, name: str, verdict: Verdict) -> None:
    from rich.markup import escape

    out.print(f"[bold]recipe {name}[/]")
    for what, fact in verdict.facts.items():
        out.print(f"  {what}: {escape(fact)}")
    for unknown in verdict.unknown:
        out.print(f"  [yellow]not checked:[/] {escape(unknown)}")
    for problem in verdict.problems:
        out.print(f"  [red]cannot run:[/] {escape(problem)}")
    if not verdict.problems:
        out.print("  [green]can run here[/]")
