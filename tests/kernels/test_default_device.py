"""Ops on CPU tensors do not care for torch's default device: what they make for themselves lies beside their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import r4b_kernels as K
from r4b_kernels import PrefixLayout

CPU = torch.device("cpu")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


TARGET = torch.tensor([1, 2, -100, 0])
ROWS = torch.ones(4)
CALLS: dict[str, Callable[[], Any]] = {
    "prefix_attention": lambda: K.prefix_attention(
        ATTENTION[0], ATTENTION[1], ATTENTION[1], PrefixLayout.from_lengths([3, 4, 2, 5], [-1, 0, -1, 0], device=CPU)
    ),
    "vision_attention": lambda: K.vision_attention(ATTENTION[0], ATTENTION[0], ATTENTION[0], CU_SEQLENS),
    "linear_logprob": lambda: K.linear_logprob(HEAD[0], HEAD[1], TARGET)[0],
    "policy_loss_head": lambda: K.policy_loss_head(HEAD[0], HEAD[1], TARGET, -ROWS, ROWS, ROWS).loss,
    "linear_distill": lambda: K.linear_distill(HEAD[0], HEAD[1], IDS, LOGPROBS, ROWS).loss,
    "group_advantage": lambda: K.group_advantage(REWARDS, OFFSETS, MODES, token_offsets=TOKENS).token_advantage,
    "qk_norm_mrope": lambda: K.qk_norm_mrope(
        ATTENTION[0], ATTENTION[1], WEIGHT, WEIGHT, POSITIONS, theta=1e4, sections=[2, 1, 1], interleaved=True
    )[0],
    "rms_norm": lambda: K.rms_norm(HEAD[0], WEIGHT),
    "swiglu": lambda: K.swiglu(HEAD[0]),
    "merge_norm": lambda: K.merge_norm(HEAD[0], WEIGHT, WEIGHT, merge=2, order=ORDER),
    "scatter_vision": lambda: K.scatter_vision(HEAD[0], HEAD[1], INDEX),
}
ATTENTION = normal(14, 4, 8), normal(14, 2, 8)
HEAD, WEIGHT = (normal(4, 8), normal(11, 8)), normal(8)
CU_SEQLENS = torch.tensor([0, 5, 14], dtype=torch.int32)
IDS, LOGPROBS = torch.tensor([[1, 3]] * 4), torch.full((4, 2), -1.5)
REWARDS, OFFSETS, MODES = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 3]), torch.tensor([0, 1, 1])
TOKENS, POSITIONS = torch.tensor([0, 2, 3, 7]), torch.arange(14).expand(3, -1)
INDEX, ORDER = torch.tensor([-1, 2, 0, -1]), torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize("op", CALLS)
def test_ops_with_another_default_device(op: str) -> None:
    expected = CALLS[op]()
    with torch.device("meta"):
        out = CALLS[op]()
        if out.requires_grad:
            out.backward(torch.ones_like(expected, device=CPU))
    assert torch.equal(out, expected)


def test_packing_with_another_default_device() -> None:
    lengths = [[30, 10], [40, 5, 5]]
    expected = K.pack_groups([20, 10], lengths, 64)
    with torch.device("meta"):
        assert K.pack_groups([20, 10], lengths, 64).bins == expected.bins


def test_a_layout_and_its_mask_with_another_default_device() -> None:
    layout = PrefixLayout.from_lengths([3, 2], [-1, 0], device=CPU)
    expected = layout.dense_mask(5)
    with torch.device("meta"):
        assert torch.equal(layout.dense_mask(5), expected)
