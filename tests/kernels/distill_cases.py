"""Data and an independent definition shared by the tests of linear_distill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
# A power of two: multiplying the gradients by it rounds nothing.
SEED = -2.0
FLOOR = 2.0**-23


def make(
    tokens: int, width: int, vocabulary: int, slots: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A head and rows with full, padded and dead rows among them; NaN wherever nothing may be read."""
    hidden = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(vocabulary, width, dtype=dtype) / width**0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = (2 * torch.randn(tokens, vocabulary, dtype=wide)).log_softmax(-1)
    ids = torch.rand(tokens, vocabulary).argsort(1)[:, :slots]
    rows = {
        "teacher_ids": ids.contiguous(),
        "teacher_logprobs": teacher.gather(1, ids),
        "row_weight": torch.rand(tokens, dtype=wide) + 0.1,
    }
    rows["teacher_ids"][1::4, slots // 2 + 1 :] = -1
    rows["teacher_ids"][2::4, : slots // 3] = -7
    rows["teacher_ids"][3::8] = -1
    rows["row_weight"][5::8] = 0.0
    rows["teacher_logprobs"][rows["teacher_ids"] < 0] = torch.nan
    dead = (rows["row_weight"] == 0) | (rows["teacher_ids"] < 0).all(1)
    hidden[dead] = torch.nan
    return hidden, weight, rows


def double(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}


def definition(
    hidden: Tensor,
    weight: Tensor,
    rows: dict[str, Tensor],
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: bool = True,
) -> dict[str, Tensor]:
    """Row by row, as the documentation states it, in float64; differentiable by autograd."""
    divergences, teacher_mass, student_mass, entropy = [], [], [], []
    zero = torch.zeros((), dtype=torch.float64)
    for t, (ids, logprobs, row_weight) in enumerate(zip(*rows.values(), strict=True)):
        if row_weight == 0 or bool((ids < 0).all()):
            for results in (divergences, teacher_mass, student_mass, entropy):
                results.append(zero)
            continue
        listed = ids[ids >= 0]
        log_t = logprobs[ids >= 0].double()
        log_p = torch.log_softmax(hidden[t].double() @ weight.double().T / temperature, -1)
        others = torch.ones(weight.shape[0], dtype=torch.bool)
        others[listed] = False
        teacher_mass.append(log_t.exp().sum())
        student_mass.append(log_p[listed].exp().sum() if tail else zero + 1)
        log_q = log_p[listed]
        if tail:
            entropy.append(torch.special.entr(log_p.exp()).sum())
            if bool(others.any()):
                left = (1 - log_t.exp().sum()).clamp_min(FLOOR)
                log_t = torch.cat([log_t, left.log()[None]])
                log_q = torch.cat([log_q, torch.logsumexp(log_p[others], 0)[None]])
        log_t, log_q = log_t - torch.logsumexp(log_t, 0), log_q - torch.logsumexp(log_q, 0)
        if not tail:
            entropy.append(torch.special.entr(log_q.exp()).sum())
        if divergence == "jsd":
            log_m = (beta * log_t.exp() + (1 - beta) * log_q.exp()).log()
            divergences.append(beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_q, log_m))
        else:
            divergences.append(_kl(log_t, log_q) if divergence == "forward_kl" else _kl(log_q, log_t))
    empty = torch.zeros(0, dtype=torch.float64)
    columns = (divergences, teacher_mass, student_mass, entropy)
    stacked = [torch.stack(column) if column else empty for column in columns]
    live = torch.isfinite(rows["row_weight"]) & (rows["row_weight"] != 0)
    loss = (torch.where(live, rows["row_weight"], 0.0).double() * stacked[0]).sum() + 0 * weight.double().sum()
    names = ("divergence", "teacher_mass", "student_mass", "entropy")
    return {"loss": loss + 0 * hidden[:0].double().sum(), **dict(zip(names, stacked, strict=True))}


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum()


def with_gradients(function: Any, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The results of ``function(hidden, weight)``, a mapping with a loss, and the gradients of SEED times that loss."""
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    results = function(h, w)
    loss = results["loss"]
    gradients = torch.autograd.grad(loss * SEED, (h, w))
    named = {name: value.detach() for name, value in results.items()}
    return named | {"hidden": gradients[0], "weight": gradients[1]}
