"""Small collectives on plain values: JSON and tensors only, so that nothing that arrives is unpickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TENSOR = "__tensor__"


def _encode(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(payload: Tensor) -> Any:
    return json.loads(payload.cpu().numpy().tobytes())


def broadcast_json(value: Any, source: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
    """JSON-able ``value`` of global rank ``source``, on every rank of ``group`` (tuples arrive as lists)."""
    if dist.get_world_size(group) == 1:
        return json.loads(json.dumps(value))
    mine = dist.get_rank() == source
    payload = _encode(value, device) if mine else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    dist.broadcast(size, src=source, group=group)
    if not mine:
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, src=source, group=group)
    return _decode(payload)


def gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """JSON-able ``value`` of every rank of ``group``, in rank order, on each of them."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return [json.loads(json.dumps(value))]
    payload = _encode(value, device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64, device=device), group=group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [_decode(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def broadcast_tree(value: Any, source: int, device: torch.device, group: dist.ProcessGroup) -> Any:
    """Nested lists and dicts of tensors and JSON-able values, from global rank ``source`` to all of ``group``."""
    if dist.get_world_size(group) == 1:
        return value
    tensors: list[Tensor] = []
    mine = dist.get_rank() == source
    skeleton = broadcast_json(_strip(value, tensors) if mine else None, source, device, group)
    if not mine:
        _allocate(skeleton, tensors, device)
    for tensor in tensors:
        # uint8 views carry every dtype, whatever the backend knows.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=source, group=group)
    return _restore(skeleton, iter(tensors))


def _strip(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, dict):
        return {key: _strip(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strip(item, tensors) for item in value]
    return value


def _allocate(skeleton: Any, tensors: list[Tensor], device: torch.device) -> None:
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            dtype, shape = skeleton[_TENSOR]
            tensors.append(torch.empty(shape, dtype=getattr(torch, dtype), device=device))
            return
        for item in skeleton.values():
            _allocate(item, tensors, device)
    elif isinstance(skeleton, list):
        for item in skeleton:
            _allocate(item, tensors, device)


def _restore(skeleton: Any, tensors: Any) -> Any:
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return next(tensors)
        return {key: _restore(item, tensors) for key, item in skeleton.items()}
    if isinstance(skeleton, list):
        return [_restore(item, tensors) for item in skeleton]
    return skeleton
