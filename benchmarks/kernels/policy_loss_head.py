"""policy_loss_head on the CPU, forward and backward, with all rows live and with half of them dead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r4b_kernels import policy_loss_head

LOADS = {"T1500_H128_V64": (1500, 128, 64), "T512_H256_V32768": (512, 256, 32768)}
SEQUENCES = 4


@pytest.mark.parametrize("live", [1.0, 0.5], ids=["all_live", "half_live"])
@pytest.mark.parametrize("load", LOADS)
def test_policy_loss_head(load: str, live: float, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    tokens, width, vocabulary = LOADS[load]
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,))
    per_sequence = torch.randn(SEQUENCES)
    per_sequence[int(live * SEQUENCES) :] = 0.0
    advantage = per_sequence.repeat_interleave(tokens // SEQUENCES)
    row_weight = torch.full((tokens,), 1.0 / tokens)
    with torch.no_grad():
        old = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None]).squeeze(1)

    def loss_of(logprob: Tensor) -> Tensor:
        ratio = torch.exp(logprob - old)
        return -(row_weight * torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()

    def composed() -> Tensor:
        return loss_of(torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None]).squeeze(1))

    def fused() -> Tensor:
        return policy_loss_head(hidden, weight, target, old, advantage, row_weight).loss

    def trained(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (hidden, weight))

    for mine, theirs in zip(trained(fused)(), trained(composed)(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    h, w = hidden.detach(), weight.detach()

    def bare_products() -> object:
        z = h @ w.T
        return z @ w, z.T @ h

    rivals: dict[str, Callable[[], object]] = {"torch composed": trained(composed), "bare products": bare_products}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        chunked = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")
        by_sequence = (SEQUENCES, tokens // SEQUENCES)
        mask = torch.ones(by_sequence)
        rivals["Liger chunked, eager"] = trained(
            lambda: chunked(
                hidden.view(*by_sequence, width),
                weight,
                target.view(by_sequence),
                mask,
                per_sequence,
                old_per_token_logps=old.view(by_sequence),
            )[0]
        )
    contest(
        trained(fused),
        rivals,
        bytes_moved=2 * (hidden.nbytes + 2 * weight.nbytes),
        flops=int(2 * (1 + 2 * live) * tokens * width * vocabulary),
    )
