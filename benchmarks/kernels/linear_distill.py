"""linear_distill, forward and backward: generalised JSD to a teacher's top 64, with and without a tail.

Liger's chunked loss takes the teacher's hidden states and head and compares whole distributions: 8 T H V FLOPs where we
have 6. What the teacher costs us elsewhere is not in our time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels._machine import DTYPE, on
from r4b_kernels import linear_distill

LOADS = on(
    {"T1500_H128_V512": (1500, 128, 512), "T512_H256_V32768": (512, 256, 32768)},
    {"T8192_H4096_V151936": (8192, 4096, 151936), "T8192_H2560_V151936": (8192, 2560, 151936)},
)
SLOTS = 64


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "no_tail"])
@pytest.mark.parametrize("load", LOADS)
def test_linear_distill(load: str, tail: bool, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    tokens, width, vocabulary = LOADS[load]
    hidden = torch.randn(tokens, width, dtype=DTYPE).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(DTYPE).requires_grad_()
    teacher_hidden, teacher_weight = torch.randn_like(hidden), torch.randn_like(weight) / width**0.5
    ids, logprobs = _top(teacher_hidden, teacher_weight)
    row_weight = torch.full((tokens,), 1.0 / tokens)
    h, w = hidden.detach(), weight.detach()

    def composed() -> Tensor:
        z = (hidden @ weight.T).float()
        log_q, log_t = z.gather(1, ids), logprobs
        if tail:
            log_q = log_q - z.logsumexp(1, keepdim=True)
            log_q, log_t = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_q, log_t))
        else:
            log_q, log_t = log_q.log_softmax(1), log_t.log_softmax(1)
        log_m = (log_q.exp() / 2 + log_t.exp() / 2).log()
        pairs = log_t.exp() * (log_t - log_m) + log_q.exp() * (log_q - log_m)
        return (row_weight * pairs.sum(1)).sum() / 2

    def fused() -> Tensor:
        return linear_distill(hidden, weight, ids, logprobs, row_weight, divergence="jsd", tail=tail).loss

    def trained(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (hidden, weight))

    def bare_products() -> object:
        z = h @ w.T
        return z @ w, z.T @ h

    rivals: dict[str, Callable[[], object]] = {"torch composed": trained(composed), "bare products": bare_products}
    skipped = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
        labels = torch.zeros(tokens, dtype=torch.int64)
        rivals["Liger chunked, whole teacher"] = trained(
            lambda: chunked(hidden, weight, teacher_hidden, teacher_weight, labels)
        )
    else:
        skipped["Liger chunked, whole teacher"] = "liger-kernel is not installed"
    _agree(trained(fused)(), trained(composed)())
    columns = vocabulary if tail else SLOTS
    moved = 2 * hidden.nbytes + (2 if tail else 0) * weight.nbytes + weight.numel() * 4
    contest(
        trained(fused),
        rivals,
        bytes_moved=moved + (0 if tail else 3 * tokens * SLOTS * width * hidden.itemsize),
        flops=6 * tokens * width * columns,
        skipped=skipped,
    )


def _top(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's best ids and their log-probabilities, in chunks."""
    parts = []
    for chunk in hidden.split(512):
        z = (chunk @ weight.T).float()
        best = z.topk(SLOTS)
        parts.append((best.indices, best.values - z.logsumexp(1, keepdim=True)))
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def _agree(mine: object, theirs: object) -> None:
    tolerance = {"rtol": 1e-3, "atol": 1e-7} if DTYPE == torch.float32 else {"rtol": 0.1, "atol": 1e-5}
    torch.testing.assert_close(mine, theirs, **tolerance)
