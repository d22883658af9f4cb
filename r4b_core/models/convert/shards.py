"""Writing safetensors files one tensor at a time: the header is known before the first of them is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from r4b_core.models.convert.files import Stream
from r4b_core.models.convert.huggingface import BYTES, Entry
from r4b_core.models.convert.rules import Shape


@dataclass(frozen=True)
class Group:
    """Tensors (names and shapes) of one type that are made together and lie in one file."""

    tensors: Mapping[str, Shape]
    dtype: str
    make: Callable[[], Iterator[Tensor]]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(_bytes(self.dtype, shape) for shape in self.tensors.values())


def copied(name: str, entry: Entry) -> Group:
    """A tensor as it lies in another file."""
    return Group({name: entry.shape}, entry.dtype, lambda: iter([entry.read()]))


def filled(name: str, shape: Shape, dtype: str, value: float) -> Group:
    """A small tensor of one value, of type F32 or BF16."""
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    return Group({name: shape}, dtype, partial(iter, [torch.full(shape, value, dtype=kind)]))


def write_safetensors(stream: Stream, groups: Sequence[Group]) -> None:
    # Wider types first: every value lies at a multiple of its size.
    groups = sorted(groups, key=lambda group: -BYTES[group.dtype])
    stream.write(_header(groups))
    for group in groups:
        for (name, shape), tensor in zip(group.tensors.items(), group.make(), strict=True):
            assert tuple(tensor.shape) == shape and tensor.nbytes == _bytes(group.dtype, shape), name
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _header(groups: Sequence[Group]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in groups:
        for name, shape in group.tensors.items():
            start, end = end, end + _bytes(group.dtype, shape)
            header[name] = {"dtype": group.dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(dtype: str, shape: Shape) -> int:
    return prod(shape) * BYTES[dtype]
