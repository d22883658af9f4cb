"""Megatron-Core's torch_dist format, written and read one parameter at a time, without ranks.

The files are those that :mod:`r4b_core.parallel.sharded_files` writes and reads: any layout loads what is written
here, and what any layout wrote is read here.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from r4b_core.models.convert.files import OnProgress, Stream
from r4b_core.models.convert.rules import Rule
from r4b_core.models.convert.settings import ConversionError
from r4b_core.parallel import manifest
from r4b_core.parallel.sharded_files import COMMON, CONFIG, read_metadata

_OPTIMIZER = "optimizer."
# What torch.save adds to a small tensor, about.
OVERHEAD = 2048


def write_rules(stream: Stream, rules: Sequence[Rule], read: Callable[[str], Tensor], dtype: torch.dtype) -> list[Any]:
    """Write the parameters of ``rules``; returns for each its key, offset in the tensor, and place in the file."""
    places = []
    for rule in rules:
        value = rule.join(read).to(dtype)
        value, start = value.view([1] * len(rule.stack) + [*value.shape]), stream.position
        torch.save(_own_memory(value), cast(IO[bytes], stream))
        places.append([rule.key, rule.offset, start, stream.position - start])
    return places


def _own_memory(value: Tensor) -> Tensor:
    """torch.save writes the whole memory that a tensor is a view of."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()


def contents(rules: Sequence[Rule], parts: dict[str, list[Any]], dtype: torch.dtype) -> bytes:
    """The ``.metadata`` of parameters that lie in ``parts`` (by file, as :func:`write_rules` returned them)."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for rule in rules:
        size, chunk = torch.Size([*rule.stack, *rule.shape]), torch.Size([1] * len(rule.stack) + [*rule.shape])
        entry = tensors.setdefault(rule.key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(rule.offset), chunk))
    storage = {
        MetadataIndex(key, torch.Size(offset)): _StorageInfo(file, start, length)
        for file, places in parts.items()
        for key, offset, start, length in places
    }
    metadata = Metadata(dict(tensors), None, storage, StorageMeta(), CURRENT_DCP_VERSION)
    return pickle.dumps(metadata)


def small_files(state: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint beside its tensors; ``state`` is the caller's."""
    common = io.BytesIO()
    torch.save({}, common)
    config = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
    learner = {"step_count": 0, "skipped_in_a_row": 0}
    return {
        COMMON: common.getvalue(),
        CONFIG: json.dumps(config).encode(),
        "state.json": json.dumps({"learner": learner, "state": state}).encode(),
    }


class TorchDist:
    """The parameters of a checkpoint folder, whatever layout wrote it.

    Raises:
        ConversionError, CheckpointError: the folder is incomplete or was altered, or is of another model.
    """

    def __init__(self, folder: Path, rules: Sequence[Rule], on_progress: OnProgress | None = None) -> None:
        self.folder = folder
        self.facts = manifest.read(folder)
        count = len(self.facts["files"])
        for number in range(count):
            if damage := manifest.find_damage(folder, self.facts, number, count):
                raise ConversionError(damage)
            if on_progress is not None:
                on_progress("checking", number + 1, count)
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if not name.startswith(_OPTIMIZER) and isinstance(entry, TensorStorageMetadata)
        }
        self.dtype = self._check(rules)

    def _check(self, rules: Sequence[Rule]) -> torch.dtype:
        wanted = {rule.key: [*rule.stack, *rule.shape] for rule in rules}
        problems = [f"{name}: missing, expected {shape}" for name, shape in wanted.items() if name not in self.tensors]
        dtypes = [entry.properties.dtype for entry in self.tensors.values()]
        dtype = max(sorted(set(dtypes), key=str), key=dtypes.count, default=torch.float32)
        for name, entry in self.tensors.items():
            size = list(entry.size)
            if name not in wanted:
                problems.append(f"{name}: extra, {size}")
            elif size != wanted[name]:
                problems.append(f"{name}: expected {wanted[name]}, found {size}")
            elif entry.properties.dtype != dtype:
                problems.append(f"{name}: expected the type {dtype} of most tensors, found {entry.properties.dtype}")
        if problems:
            raise ConversionError(
                f"{self.folder} does not hold the parameters of the model that its recipe describes "
                f"({len(problems)} problems):\n" + "\n".join(f"  {problem}" for problem in problems)
            )
        return dtype

    def read(self, rule: Rule) -> Tensor:
        """The whole parameter of one layer, put together from the parts that ranks wrote."""
        whole: Tensor | None = None
        filled = 0
        for chunk in self.tensors[rule.key].chunks:
            start, size = list(chunk.offsets), list(chunk.sizes)
            inside = slice(None)
            if rule.layer is not None:
                if not start[0] <= rule.layer < start[0] + size[0]:
                    continue
                inside = slice(rule.layer - start[0], rule.layer - start[0] + 1)
                start[0], size[0] = 0, 1
            part = self._part(MetadataIndex(rule.key, chunk.offsets))[inside]
            if part.numel() == rule.numel:
                return part.view(rule.shape)
            if whole is None:
                whole = torch.empty([1] * len(rule.stack) + [*rule.shape], dtype=self.dtype)
            whole[tuple(slice(x, x + n) for x, n in zip(start, size, strict=True))] = part
            filled += part.numel()
        if whole is None or filled != rule.numel:
            raise ConversionError(f"{self.folder}: {rule.name} is not covered by its parts: take another checkpoint")
        return whole.view(rule.shape)

    def _part(self, index: MetadataIndex) -> Tensor:
        info = self.metadata.storage_data[index]
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return torch.load(cast(IO[bytes], _Window(file, info.length)), map_location="cpu", weights_only=True)


class _Window(io.RawIOBase):
    """``length`` bytes of a file from where it stands, as a file of its own."""

    def __init__(self, file: io.BufferedReader, length: int) -> None:
        self._file, self._start, self._length, self._position = file, file.tell(), length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._position))]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count
