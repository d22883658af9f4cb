"""Checkpoints: model, optimizer, schedule, random generators and the caller's state, complete or absent, never half.

In the same layout a run continues bit for bit. In another layout or world size the tensors are resharded, the random
generators are seeded anew, and the numbers agree to rounding only. All ranks must see the folder: on several machines
it lies on a shared file system.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from r4b_core.parallel import device, manifest, optimizer_format, rng, sharded_files
from r4b_core.parallel.collectives import broadcast_json, gather_json
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.manifest import CheckpointError, CheckpointWriteError, remove_leftovers
from r4b_core.parallel.runtime import seed_all

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "latest",
    "load",
    "load_weights",
    "read_state",
    "remove_leftovers",
    "save",
]

logger = logging.getLogger(__name__)

_STATE = "state.json"
_OPTIMIZER = "optimizer."
_NAMES_SHOWN = 8


def save(directory: Path | str, step: int, learner: Learner, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``directory/step_<step>`` and keep the newest ``keep``. A collective of all ranks.

    Args:
        step: updates done; the folder's number.
        state: JSON-able, the same on every rank (rank 0's is written): position in the data, stage, metrics.
        keep: how many complete checkpoints remain.

    Raises:
        CheckpointWriteError: on every rank alike, after the unfinished folder was removed (disk full, for one).
        ValueError: ``state`` is not JSON-able, or ``keep`` is below one.
    """
    runtime, directory = learner.runtime, Path(directory)
    if keep < 1:
        raise ValueError(f"checkpoint.keep = {keep}: at least 1, or the checkpoint just written would be removed")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"state cannot be saved as JSON ({error}): give plain numbers, strings, lists and dicts"
        ) from error
    target = broadcast_json(_prepare(directory, step) if runtime.is_main else None, 0, runtime.device)
    if "error" in target:
        raise CheckpointWriteError(f"cannot write under {directory}: {target['error']}")
    aside = Path(target["folder"])
    try:
        job = sharded_files.Save(_tensors(learner, is_loading=False), aside)
        results, files, error = _write_part(job, learner, state, aside)
        reports = gather_json({"files": files, "error": error}, runtime.device)
        _raise_first(reports, directory)
        written: list[Any] | None = [None] * runtime.world if runtime.is_main else None
        dist.gather_object(results, written)
        error = ""
        if written is not None:
            contents = {name: entry for report in reports for name, entry in report["files"].items()}
            error = _publish(job, written, aside, directory, step, learner, contents, keep)
        _raise_first([broadcast_json({"error": error}, 0, runtime.device)], directory)
    except CheckpointWriteError:
        if runtime.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return directory / manifest.step_name(step)


def _prepare(directory: Path, step: int) -> dict[str, str]:
    try:
        remove_leftovers(directory)
        return {"folder": str(manifest.make_aside(directory, step))}
    except OSError as error:
        return {"error": str(error)}


def _write_part(
    job: sharded_files.Save, learner: Learner, state: dict[str, Any], aside: Path
) -> tuple[list[Any], dict[str, Any], str]:
    """This rank's files, without any collective: a failure here must not leave other ranks waiting."""
    runtime = learner.runtime
    try:
        results, names = job.write()
        manifest.write_json(aside / _rng_name(runtime.rank), rng.capture())
        names.append(_rng_name(runtime.rank))
        if runtime.is_main:
            counters = {"step_count": learner.step_count, "skipped_in_a_row": learner.skipped_in_a_row}
            manifest.write_json(aside / _STATE, {"learner": counters, "state": state})
            names.append(_STATE)
        return results, manifest.describe(aside, names), ""
    except (OSError, RuntimeError) as error:
        # torch's serialization turns a failed write into a RuntimeError.
        return [], {}, f"rank {runtime.rank}: {error}"


def _publish(
    job: sharded_files.Save,
    results: list[Any],
    aside: Path,
    directory: Path,
    step: int,
    learner: Learner,
    contents: dict[str, Any],
    keep: int,
) -> str:
    try:
        contents = {**contents, **manifest.describe(aside, job.finish(results))}
        facts = {"layout": learner.runtime.layout, "versions": _versions(), "files": contents}
        manifest.publish(aside, directory, step, facts)
    except OSError as error:
        return str(error)
    try:
        manifest.prune(directory, keep)
    except OSError as error:
        logger.warning("old checkpoints under %s could not be removed: %s", directory, error)
    return ""


def _raise_first(reports: Sequence[dict[str, Any]], directory: Path) -> None:
    errors = [report["error"] for report in reports if report["error"]]
    if errors:
        raise CheckpointWriteError(
            f"no checkpoint was written under {directory} ({errors[0]}): earlier ones are intact and training can go "
            "on; free space, or lower checkpoint.keep, before the next one is due"
        )


def latest(directory: Path | str) -> Path | None:
    """The newest complete checkpoint, None if there is none."""
    steps = manifest.complete_steps(Path(directory))
    return next(reversed(steps.values()), None)


def read_state(path: Path | str) -> dict[str, Any]:
    """The caller's state in a checkpoint, without loading tensors; the file is verified.

    Raises:
        CheckpointError: the checkpoint is incomplete or was altered.
    """
    path = Path(path)
    facts = manifest.read(path)
    damage = manifest.find_damage(path, facts, only=_STATE)
    if damage:
        raise CheckpointError(damage)
    return json.loads((path / _STATE).read_text())["state"]


def load(path: Path | str, learner: Learner) -> dict[str, Any]:
    """Restore ``learner`` and the random generators; returns the caller's state. A collective of all ranks.

    Raises:
        CheckpointError: on every rank alike: the folder is incomplete or altered, or of another model.
    """
    runtime = learner.runtime
    path, facts = _verify(Path(path))
    saved = {"virtual_stages": 1, **facts["layout"]}
    is_foreign = saved["distributed_optimizer"] != runtime.distributed_optimizer
    template = _tensors(learner, is_loading=True)
    if is_foreign:
        optimizer_format.rename(template, learner)
    _check_names(path, template, lambda name: is_foreign and optimizer_format.is_left_out(name, learner))
    loaded = dist_checkpointing.load(template, str(path), validate_access_integrity=False)
    _load_model(learner.chunks, loaded)
    if is_foreign:
        loaded["optimizer"] = optimizer_format.convert(loaded["optimizer"], learner)
    with torch.no_grad():
        learner.optimizer.load_state_dict(loaded["optimizer"])
    stored = json.loads((path / _STATE).read_text())
    learner.step_count = stored["learner"]["step_count"]
    learner.skipped_in_a_row = stored["learner"]["skipped_in_a_row"]
    if saved == runtime.layout:
        rng.restore(json.loads((path / _rng_name(runtime.rank)).read_text()))
    else:
        seed_all(runtime.seed + facts["step"])
        if runtime.is_main:
            logger.warning(
                "%s was saved in layout %s and is resharded to %s: random generators are seeded anew, and the run "
                "continues to rounding, not bit for bit",
                path,
                saved,
                runtime.layout,
            )
    return stored["state"]


def load_weights(path: Path | str, model_chunks: Sequence[torch.nn.Module]) -> None:
    """Load the model alone, in any layout: for evaluation, generation and the next stage. A collective of all ranks.

    Call it before :class:`Learner` is built, whose optimizer copies bfloat16 weights to float32; with a Learner that
    exists, call ``learner.optimizer.reload_model_params()`` afterwards.

    Raises:
        CheckpointError: on every rank alike: the folder is incomplete or altered, or of another model.
    """
    path, _ = _verify(Path(path))
    template = _model_tensors(model_chunks)
    _check_names(path, template, lambda name: name.startswith(_OPTIMIZER))
    loaded = dist_checkpointing.load(template, str(path), validate_access_integrity=False)
    _load_model(model_chunks, loaded)


def _tensors(learner: Learner, *, is_loading: bool) -> dict[str, Any]:
    model = _model_tensors(learner.chunks)
    # Gathered on the first data-parallel rank over gloo, so that the others hold no whole optimizer.
    how = {
        "distrib_optim_sharding_type": optimizer_format.SHARDING_TYPE,
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    named = _model_tensors(learner.chunks, by_layer=True) if _trains_single_layers(learner) else model
    optimizer = learner.optimizer.sharded_state_dict(named, is_loading=is_loading, metadata=how)
    return {**model, "optimizer": sharded_files.drop_empty_objects(optimizer)}


def _trains_single_layers(learner: Learner) -> bool:
    """Whether some layers are frozen and others not: stacked in one tensor, their moments would have gaps."""
    kinds: dict[str, set[bool]] = {}
    mine = [
        [re.sub(r"\.\d+\.", ".", name), parameter.requires_grad]
        for model in learner.models
        for name, parameter in model.named_parameters()
    ]
    for kind, trains in (entry for part in gather_json(mine, learner.runtime.device) for entry in part):
        kinds.setdefault(kind, set()).add(trains)
    return any(len(trains) == 2 for trains in kinds.values())


def _model_tensors(chunks: Sequence[torch.nn.Module], *, by_layer: bool = False) -> dict[str, Any]:
    how: dict[str, Any] = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    how |= {"singleton_local_shards": False, "non_homogeneous_layers": by_layer}
    return {
        f"model{index}": sharded_files.drop_empty_objects(_unwrap(chunk).sharded_state_dict(metadata=how))
        for index, chunk in enumerate(chunks)
    }


def _load_model(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        _unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _unwrap(chunk: Any) -> Any:
    return chunk.module if hasattr(chunk, "ddp_config") else chunk


def _verify(path: Path) -> tuple[Path, dict[str, Any]]:
    """Rank 0 chooses the folder and reads its manifest; the ranks share the hashing; all of them raise, or none."""
    where, rank, world = device.device(), dist.get_rank(), dist.get_world_size()
    verdict: dict[str, Any] = {}
    if rank == 0:
        try:
            verdict = {"path": str(path), "facts": manifest.read(path), "error": ""}
        except CheckpointError as error:
            verdict = {"error": str(error)}
    verdict = broadcast_json(verdict, 0, where)
    if verdict["error"]:
        raise CheckpointError(verdict["error"])
    path, facts = Path(verdict["path"]), verdict["facts"]
    damages = gather_json(manifest.find_damage(path, facts, rank, world), where)
    error = next((damage for damage in damages if damage), "")
    if not error:
        try:
            sharded_files.read_metadata(path)
            sharded_files.check_common(path)
        except CheckpointError as refusal:
            error = str(refusal)
        error = next((message for message in gather_json(error, where) if message), "")
    if error:
        raise CheckpointError(error)
    return path, facts


def _check_names(path: Path, template: dict[str, Any], is_left_out: Callable[[str], bool]) -> None:
    """Compare the names and global shapes of all ranks' tensors with the checkpoint's, but for what is left out."""
    wanted: dict[str, list[int]] = {}
    for part in gather_json(sharded_files.shapes(template), device.device()):
        wanted.update(part)
    contents = sharded_files.read_metadata(path).state_dict_metadata
    found = {name: list(entry.size) for name, entry in contents.items() if not is_left_out(name)}
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    misshapen = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in sorted(set(wanted) & set(found))
        if found[name] != wanted[name]
    ]
    problems = [
        f"{len(names)} {label}: {_some(names)}"
        for label, names in (("missing", missing), ("extra", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is of another model. Tensors {'; '.join(problems)}. Set model.family, model.size and model.shape "
            "(and the frozen parts) as in the run that wrote it, or give another checkpoint"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.json"


def _versions() -> dict[str, str]:
    names = ("torch", "megatron-core", "numpy")
    return {"python": platform.python_version(), **{name: package_metadata.version(name) for name in names}}
