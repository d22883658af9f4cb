"""What the tests of models, losses and rollouts share: small models with uneven weights, and random prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.models.r4b.model import R4BModel, build_model

# No two sizes agree that could hide a transposed or swapped dimension.
SMALL: dict[str, Any] = dict(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=64,
    rope_theta=5e3,
    patch_size=4,
    vision_num_layers=2,
    vision_hidden_size=24,
    vision_ffn_hidden_size=40,
    vision_num_heads=3,
    vision_grid=(3, 4),
)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> R4BModel:
    """A small model whose norms and biases are random too: at ones and zeros they would hide a missing one."""
    model = build_model(ModelConfig(shape={**SMALL, **shape}), ParallelConfig(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def random_prompt(
    generator: torch.Generator, before: int, grids: Sequence[tuple[int, int]] = (), after: int = 1, patch_size: int = 4
) -> EncodedPrompt:
    """``before`` text tokens, images of the given (rows, columns) with their row separators, ``after`` text tokens."""
    index = [PackedBatch.TEXT_INDEX] * before
    patches = 0
    for rows, columns in grids:
        for _ in range(rows):
            index += [*range(patches, patches + columns), PackedBatch.NEWLINE_INDEX]
            patches += columns
    index += [PackedBatch.TEXT_INDEX] * after
    return EncodedPrompt(
        torch.randint(0, SMALL["vocab_size"], (len(index),), generator=generator),
        torch.tensor(index),
        torch.randn(patches, 3 * patch_size**2, generator=generator),
        torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64).view(-1, 3),
    )


def random_tokens(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(0, SMALL["vocab_size"], (count,), generator=generator).tolist()


def one_batch(prompt: EncodedPrompt, response: Sequence[int], **columns: Any) -> PackedBatch:
    """One prompt with one response, as one plain sequence."""
    ((batch,),) = pack_groups_for_rl(
        [prompt], [[Response(response, columns=columns)]], capacity=10_000, share_prefix=False
    )
    return batch


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, taken out of the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        taken[name] = parameter.grad
        parameter.grad = None
    return taken


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], relative: float) -> None:
    """Each parameter's gradient agrees to ``relative`` of its own norm, and none is trivially zero."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        norm = gradient.norm()
        assert norm > 0, f"the gradient of {name} is zero: the test would not see it"
        assert (got[name] - gradient).norm() <= relative * norm, (
            f"{name}: {float((got[name] - gradient).norm() / norm):.1e} relative"
        )
