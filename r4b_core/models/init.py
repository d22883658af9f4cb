"""Initial weights that are the same under every parallel layout.

Each parameter is drawn whole from a generator seeded by its global name, and the rank keeps its shard. So a recipe
starts from the same weights on one rank and on 64, and layouts can be compared without copying weights.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from r4b_core.parallel.names import global_names


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Normal(0, std) for matrices (less for residual outputs), ones for norms, zeros for biases.

    Args:
        model: one pipeline stage; its layers carry their global ``layer_number``.
        seed: of the run.
        std: standard deviation; that of matrices which write to the residual is std / sqrt(2 * num_layers).
        num_layers: of the decoder.
    """
    names = global_names(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(_initial_value(names[name], parameter, seed, std, num_layers))


def _initial_value(name: str, parameter: Tensor, seed: int, std: float, num_layers: int) -> Tensor:
    if parameter.dim() == 1 and "image_newline" not in name:
        return torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter)
    shape, tp = list(parameter.shape), parallel_state.get_tensor_model_parallel_world_size()
    sharded = getattr(parameter, "tensor_model_parallel", False) and tp > 1
    dim = getattr(parameter, "partition_dim", 0)
    if sharded:
        shape[dim] *= tp
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    scale = std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        scale = std / math.sqrt(2 * num_layers)
    full = torch.randn(shape, generator=generator) * scale
    if sharded:
        full = _shard(full, dim, getattr(parameter, "partition_stride", 1), tp)
    return full.to(parameter)


def _shard(full: Tensor, dim: int, stride: int, tp: int) -> Tensor:
    """My shard of a full tensor; ``stride`` blocks (gate and up) are each split over the ranks."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    return torch.cat([block.chunk(tp, dim)[rank] for block in full.chunk(stride, dim)], dim)
