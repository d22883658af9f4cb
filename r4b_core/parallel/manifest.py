"""A checkpoint folder is complete or absent: written aside, described by a manifest, published by one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_STEP_DIGITS = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: incomplete, altered, or of another model."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written and was removed; the same error on every rank. Training can go on."""


def step_name(step: int) -> str:
    return f"step_{step:0{_STEP_DIGITS}d}"


def step_of(path: Path) -> int | None:
    """The step in a folder's name, None for any other name (unfinished folders included)."""
    digits = path.name.removeprefix("step_")
    return int(digits) if path.name.startswith("step_") and digits.isdigit() else None


def complete_steps(directory: Path) -> dict[int, Path]:
    """Published checkpoints under ``directory`` by step, in ascending order."""
    if not directory.is_dir():
        return {}
    found = {step_of(path): path for path in directory.iterdir() if (path / MANIFEST).is_file()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def make_aside(directory: Path, step: int) -> Path:
    """A fresh folder beside the final name, on the same file system."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{step_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    return aside


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed writer left. Only one job may write under ``directory``."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith("step_") and ".tmp-" in path.name:
                shutil.rmtree(path, ignore_errors=True)


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of ``folder``."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}


def publish(aside: Path, directory: Path, step: int, manifest: dict[str, Any]) -> Path:
    """Write the manifest last, make everything durable, and rename the folder to its final name."""
    for path in aside.iterdir():
        _sync(path)
    write_json(aside / MANIFEST, {"format": FORMAT, "step": step, **manifest})
    _sync(aside)
    final = directory / step_name(step)
    if final.exists():
        # The same step again, after a restart from an older one. A kill between the two renames leaves it absent.
        os.rename(final, directory / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    os.rename(aside, final)
    _sync(directory)
    return final


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and leftovers."""
    steps = list(complete_steps(directory).values())
    for path in steps[: max(0, len(steps) - keep)]:
        os.rename(path, path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"))
    remove_leftovers(directory)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        hint = "an unfinished checkpoint has none" if folder.is_dir() else "the folder does not exist"
        raise CheckpointError(f"{path} is missing ({hint}): give the folder of a complete step, like .../step_00000100")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
        _ = manifest["step"], manifest["layout"], manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_way_out(folder)}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}: use the version that wrote it")
    return manifest


def find_damage(
    folder: Path, manifest: dict[str, Any], share: int = 0, shares: int = 1, only: str | None = None
) -> str:
    """What is wrong with this rank's share of the files (or the one named), in one sentence; empty if nothing."""
    if share == 0 and only is None:
        strangers = sorted({path.name for path in folder.iterdir()} - set(manifest["files"]) - {MANIFEST})
        if strangers:
            return f"{folder / strangers[0]} is not in the manifest: {_way_out(folder)}"
    for index, (name, expected) in enumerate(sorted(manifest["files"].items())):
        if name != only if only is not None else index % shares != share:
            continue
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            return f"{path} is not a plain file of the folder: {_way_out(folder)}"
        if not path.is_file():
            return f"{path} is missing: {_way_out(folder)}"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}: {_way_out(folder)}"
        if _digest(path) != expected["sha256"]:
            return f"{path} was changed since it was written (its SHA-256 differs): {_way_out(folder)}"
    return ""


def _way_out(folder: Path) -> str:
    others = [path.name for path in complete_steps(folder.parent).values() if path.name != folder.name]
    other = f", for instance {others[-1]}" if others else ""
    return f"copy the folder again from its source, or remove it and go on from another step{other}"


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
