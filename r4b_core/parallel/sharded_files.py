"""Megatron-Core's torch_dist format, written by each rank's own process, and checked before anything is unpickled.

The files are those of ``megatron.core.dist_checkpointing`` and of ``torch.distributed.checkpoint`` (DCP): ``.metadata``
says which part of which tensor lies where, ``__<rank>_<n>.distcp`` hold the parts, ``common.pt`` what has no shards.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from r4b_core.parallel.manifest import CheckpointError

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"

_SAFE_GLOBALS = {
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {
        "Size", "strided", "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
        "bool",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip


class _Writer(FileSystemWriter):
    """DCP's writer in this process and thread: no helper processes, and no path of this machine in the files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class Save:
    """One save: the constructor plans together with all ranks, :meth:`write` works alone and may fail."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        self.folder, self.rank = folder, dist.get_rank()
        sharded, self.common = save_preprocess(drop_empty_objects(state), validate_access_integrity=True)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        tensors = mcore_to_pyt_state_dict(flat, False)
        self.planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.planner.set_up_planner(tensors, is_coordinator=self.rank == 0)
        self.writer = _Writer(folder)
        plan = self.planner.create_local_plan()
        plans: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(plan, plans)
        self.metadata: Metadata | None = None
        if plans is not None:
            _, self.metadata = self.planner.create_global_plan(plans)
        plan = dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{self.rank}_"))
        self.plan = self.planner.finish_plan(plan)

    def write(self) -> tuple[list[Any], list[str]]:
        """Write this rank's part; returns what :meth:`finish` needs, and the names of the files.

        Raises:
            OSError, RuntimeError: the disk is full or gone.
        """
        self.writer.set_up_storage_writer(self.rank == 0)
        results = self.writer.write_data(self.plan, self.planner).wait() if self.plan.items else []
        names = sorted({result.storage_data.relative_path for result in results})
        if self.rank == 0:
            buffer = io.BytesIO()
            torch.save(self.common, buffer)
            (self.folder / COMMON).write_bytes(buffer.getbuffer())
            config = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
            (self.folder / CONFIG).write_text(json.dumps(config))
            names += [COMMON, CONFIG]
        return results, names

    def finish(self, results: list[list[Any]]) -> list[str]:
        """On rank 0, with every rank's results: write the table of contents."""
        assert self.metadata is not None
        self.writer.finish(self.metadata, results)
        return [METADATA]


def drop_empty_objects(state: Any) -> Any:
    """``state`` without the empty extra states of Megatron-Core's linear layers, so that no object is ever pickled.

    The optimizer's ``param_state`` is None on all but the first data-parallel rank, and is left out there.
    """

    def empty(key: str, value: Any) -> bool:
        if isinstance(value, ShardedObject):
            assert value.data is None, f"{value.key} would be pickled"
            return True
        return key == "param_state" and value is None

    if isinstance(state, dict):
        return {key: drop_empty_objects(value) for key, value in state.items() if not empty(key, value)}
    if isinstance(state, list):
        return [drop_empty_objects(value) for value in state]
    return state


def shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """Global shape of every tensor that this rank has a part of, by its name in the checkpoint."""
    sharded, _, _ = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    return {part.key: list(part.global_shape) for part in nested_values(sharded) if isinstance(part, ShardedTensor)}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _SAFE_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return getattr(importlib.import_module(module), name)


def read_metadata(folder: Path) -> Metadata:
    """The table of contents, read by an unpickler that knows DCP's own classes alone.

    Raises:
        CheckpointError: it holds anything else, or points outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _SafeUnpickler(stream).load()
    except Exception as error:
        raise CheckpointError(f"{path} is refused: {error}. Only load checkpoints that this trainer wrote") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is refused: it holds a {type(metadata).__name__}, not a checkpoint's contents")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path} is refused: {name} is a pickled object, and only tensors are read")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{path} is refused: it points to {info.relative_path}, outside the folder")
    return metadata


def check_common(folder: Path) -> None:
    """Read ``common.pt`` with ``weights_only=True`` before Megatron-Core does.

    Raises:
        CheckpointError: it holds more than plain values and tensors.
    """
    path = folder / COMMON
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is refused: {first} Only load checkpoints that this trainer wrote") from error
