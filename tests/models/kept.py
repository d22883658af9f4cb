"""What a forward pass keeps for its backward pass, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.data.batch import PackedBatch
from r4b_core.models import recompute


def kept_bytes(model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
    """The model's output, and the bytes of all storages kept for its backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []
    pack = recompute._Scope.pack

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is given away twice
        return tensor

    def counted(scope: recompute._Scope, tensor: Tensor) -> Any:
        # Of hooks the innermost alone are called: those of selective recomputation, which keep inputs instead.
        packed = pack(scope, tensor)
        for part in [packed] if isinstance(packed, Tensor) else packed[0].inputs:
            count(part)
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute._Scope, "pack", counted)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return model(batch), sum(sizes.values())
