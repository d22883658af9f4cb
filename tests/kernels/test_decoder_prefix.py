"""The prefix theorem through a whole decoder: a shared prompt costs once and changes nothing.

With hidden states computed once for a prompt, attended to by every response, and its last one gathered once per
response into the loss, the loss and the gradient of every parameter are those of the prompt written out before each
response. Positions are the ones of the written-out sequences. The rival is made of torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import PrefixLayout, policy_loss_head, prefix_attention, qk_norm_mrope, rms_norm, swiglu
from r4b_kernels.qk_norm_mrope import pair_axes
from r4b_kernels.qk_norm_mrope import reference as qk_reference
from r4b_kernels.rms_norm import reference as norm_reference
from tests.kernels.head_cases import assert_close

LAYERS, HIDDEN, HQ, HK, D, FFN, VOCABULARY = 2, 48, 4, 2, 32, 40, 61
THETA, SECTIONS = 5e3, [6, 5, 5]
KL, TEMPERATURE = 0.1, 0.8

Parameters = dict[str, Tensor]
Results = dict[str, Tensor]
Pick = Callable[[str], str | None]


@dataclass(frozen=True)
class Batch:
    """T tokens and the R rows of the loss: hidden state ``row`` predicts ``target``."""

    tokens: Tensor
    position_ids: Tensor
    layout: PrefixLayout
    row: Tensor
    target: Tensor
    advantage: Tensor
    row_weight: Tensor
    old_logprob: Tensor
    ref_logprob: Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its responses. ``image`` is a grid (rows, columns) of tokens at the prompt's start."""

    prompt: Tensor
    image: tuple[int, int]
    responses: list[Tensor]

    def prompt_positions(self) -> Tensor:
        """[3, P]: the grid's rows and columns at time 0, then text from the largest position on."""
        rows, columns = self.image
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T
        text = torch.arange(self.prompt.numel() - rows * columns) + max(rows, columns)
        return torch.cat([grid, text.expand(3, -1)], dim=1)


def groups() -> list[Group]:
    """An image and five responses, one of them of one token and one empty; no image and two; a lone response."""
    sizes = [(23, (3, 4), [7, 1, 0, 12, 3]), (9, (0, 0), [5, 4]), (6, (2, 1), [8])]

    def draw(length: int) -> Tensor:
        return torch.randint(0, VOCABULARY, (length,))

    return [Group(draw(prompt), image, [draw(n) for n in lengths]) for prompt, image, lengths in sizes]


def batch_of(groups: list[Group], share: bool, padding: int = 0) -> Batch:
    """One packed batch. With ``share`` a prompt is one segment and its responses' parent, else it precedes each."""
    tokens, positions, lengths, parents, rows, targets = [], [], [], [], [], []
    size = 0

    def append(more: Tensor, at: Tensor, parent: int) -> int:
        nonlocal size
        tokens.append(more)
        positions.append(at)
        lengths.append(more.numel())
        parents.append(parent)
        size += more.numel()
        return len(lengths) - 1

    for group in groups:
        before = group.prompt_positions()
        owner, last = -1, -1
        if share:
            owner = append(group.prompt, before, -1)
            last = size - 1
        for response in group.responses:
            after = (before.max() + 1 + torch.arange(response.numel())).expand(3, -1)
            if share:
                start = size
                append(response, after, owner)
            else:
                start = size + group.prompt.numel()
                last = start - 1
                append(torch.cat([group.prompt, response]), torch.cat([before, after], dim=1), -1)
            rows += [last, *range(start, size - 1)][: response.numel()]
            targets.append(response)
    tokens.append(torch.zeros(padding, dtype=torch.int64))
    positions.append(torch.zeros(3, padding, dtype=torch.int64))
    count = len(rows)
    return Batch(
        torch.cat(tokens), torch.cat(positions, dim=1), PrefixLayout.from_lengths(lengths, parents), torch.tensor(rows),
        torch.cat(targets), *torch.zeros(4, count, dtype=torch.float64),
    )  # fmt: skip


def parameters() -> Parameters:
    """Random float64, norms included: at one they would hide a missing one."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.norm": (HIDDEN,),
            f"{layer}.qkv": ((HQ + 2 * HK) * D, HIDDEN),
            f"{layer}.q_norm": (D,),
            f"{layer}.k_norm": (D,),
            f"{layer}.out": (HIDDEN, HQ * D),
            f"{layer}.ffn_norm": (HIDDEN,),
            f"{layer}.gate_up": (2 * FFN, HIDDEN),
            f"{layer}.down": (HIDDEN, FFN),
        }
    shapes |= {"norm": (HIDDEN,), "head": (VOCABULARY, HIDDEN)}

    def draw(shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, dtype=torch.float64)
        return value / shape[1] ** 0.5 if len(shape) == 2 else 1 + value / 4

    return {name: draw(shape) for name, shape in shapes.items()}


class Ours:
    """The operators of this package; ``pick`` names the backend of each."""

    def __init__(self, pick: Pick = lambda op: None) -> None:
        self.pick = pick

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, backend=self.pick("rms_norm"))

    def rotate(self, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return qk_norm_mrope(
            q, k, q_norm, k_norm, batch.position_ids, theta=THETA, sections=SECTIONS, interleaved=True,
            backend=self.pick("qk_norm_mrope"),
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        return prefix_attention(q, k, v, batch.layout, backend=self.pick("prefix_attention"))

    def activate(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up, backend=self.pick("swiglu"))

    def loss(self, hidden: Tensor, head: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        result = policy_loss_head(
            hidden, head, batch.target, batch.old_logprob, batch.advantage, batch.row_weight,
            ref_logprob=batch.ref_logprob, kl_coef=KL, temperature=TEMPERATURE, backend=self.pick("policy_loss_head"),
        )  # fmt: skip
        return result.loss, result.logprob


class Torch:
    """The same decoder of torch's operators, sequence by sequence where they attend. Knows no shared prompt."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm_reference.forward(x, weight, 1e-6)

    def rotate(self, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        axes = pair_axes(D, SECTIONS, True)
        return qk_reference.qk_norm_mrope(q, k, q_norm, k_norm, batch.position_ids, THETA, axes, 1e-6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        assert (batch.layout.parent == -1).all()
        parts = zip(*(x.transpose(0, 1)[None].split(batch.layout.lengths(), dim=2) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    def activate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def loss(self, hidden: Tensor, head: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, head)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / TEMPERATURE
        logprob = logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        ratio = (logprob - batch.old_logprob).exp()
        surrogate = torch.minimum(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage)
        gap = batch.ref_logprob - logprob
        return (batch.row_weight * (KL * (gap.exp() - gap - 1) - surrogate)).sum(), logprob


def decode(ops: Ours | Torch, p: Parameters, batch: Batch) -> Tensor:
    """Hidden states [T, H] after the last norm."""
    x = p["embedding"][batch.tokens]
    for layer in range(LAYERS):
        own = {name.removeprefix(f"{layer}."): value for name, value in p.items() if name.startswith(f"{layer}.")}
        qkv = F.linear(ops.norm(x, own["norm"]), own["qkv"]).view(-1, HQ + 2 * HK, D)
        q, k, v = qkv.split([HQ, HK, HK], dim=1)
        q, k = ops.rotate(q, k, own["q_norm"], own["k_norm"], batch)
        x = x + F.linear(ops.attend(q, k, v, batch).reshape(-1, HQ * D), own["out"])
        x = x + F.linear(ops.activate(F.linear(ops.norm(x, own["ffn_norm"]), own["gate_up"])), own["down"])
    return ops.norm(x, p["norm"])


def train(ops: Ours | Torch, p: Parameters, batch: Batch, dtype: torch.dtype = torch.float64) -> Results:
    """The loss, the log-probability of every row, and the gradient of every parameter."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in p.items()}
    loss, logprob = ops.loss(decode(ops, leaves, batch)[batch.row], leaves["head"], batch)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), "logprob": logprob.detach()} | dict(zip(leaves, gradients, strict=True))


def problem() -> tuple[Parameters, Batch, Batch, Results]:
    """(parameters, batch with shared prompts and padding, batch without, the truth of torch in float64).

    The policy that drew the responses and the reference are a little off: about half of the rows are clipped, none is
    near the edge of the clip range, where a rounding would decide about a row's gradient.
    """
    p, drawn = parameters(), groups()
    shared, written_out = batch_of(drawn, share=True, padding=5), batch_of(drawn, share=False)
    assert shared.tokens.numel() - 5 < 0.6 * written_out.tokens.numel()
    logprob = train(Torch(), p, written_out)["logprob"]
    columns = {
        "old_logprob": logprob + torch.tensor([-0.6, 0.0, 0.6])[torch.randint(0, 3, logprob.shape)],
        "ref_logprob": logprob + 0.3 * torch.randn_like(logprob),
        "advantage": torch.randn_like(logprob),
        "row_weight": torch.rand_like(logprob),
    }
    shared, written_out = replace(shared, **columns), replace(written_out, **columns)
    return p, shared, written_out, train(Torch(), p, written_out)


def check_float64(pick: Pick) -> None:
    p, shared, _, truth = problem()
    assert all(bool(value.any()) for value in truth.values())
    assert_close(train(Ours(pick), p, shared), truth, 1e-12)


def check_bfloat16(pick: Pick, draws: int) -> None:
    """Over some draws, the error of the gradients together is at most 1.5 times torch's own, that of none 3 times (a
    norm's gradient is 48 sums of few terms: luck)."""
    ours, theirs = torch.zeros(2, draws, len(parameters()), dtype=torch.float64)
    for draw in range(draws):
        p, shared, written_out, _ = problem()
        p = {name: value.bfloat16().double() for name, value in p.items()}
        truth = train(Torch(), p, written_out)
        for errors, ops, batch in ((ours, Ours(pick), shared), (theirs, Torch(), written_out)):
            results = train(ops, p, batch, torch.bfloat16)
            for at, name in enumerate(p):
                errors[draw, at] = (results[name].double() - truth[name]).norm() / truth[name].norm()
    assert ours.norm() <= 1.5 * theirs.norm(), f"error {ours.norm():.3e}, torch's own {theirs.norm():.3e}"
    assert (ours <= 3 * theirs).all(), f"{list(p)}: {ours / theirs}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_shared_prompt_changes_neither_loss_nor_gradients(backend: str) -> None:
    check_float64(lambda op: backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_prompts_written_out(backend: str) -> None:
    p, _, written_out, truth = problem()
    assert_close(train(Ours(lambda op: backend), p, written_out), truth, 1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bfloat16_is_no_worse_than_torch(backend: str) -> None:
    check_bfloat16(lambda op: backend, draws=6)


def test_positions_are_those_of_the_sequences_written_out() -> None:
    drawn = groups()
    shared, written_out = batch_of(drawn, share=True), batch_of(drawn, share=False)
    assert torch.equal(shared.target, written_out.target)
    for name in ("tokens", "position_ids"):
        assert torch.equal(getattr(shared, name)[..., shared.row], getattr(written_out, name)[..., written_out.row])
