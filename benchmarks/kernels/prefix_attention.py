"""prefix_attention at a small trainer's load on the CPU: many short responses under shared prompts, and long ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import PrefixLayout, prefix_attention

HQ, HK, DIM = 4, 2, 32


def groups(count: int, responses: int, prompt: tuple[int, int], response: tuple[int, int]) -> PrefixLayout:
    draw = random.Random(0)
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(count):
        owner = len(lengths)
        lengths += [draw.randint(*prompt), *(draw.randint(*response) for _ in range(responses))]
        parents += [-1, *[owner] * responses]
    return PrefixLayout.from_lengths(lengths, parents)


LOADS: dict[str, PrefixLayout] = {
    "9_prompts_16_responses_4_to_60": groups(9, 16, (20, 60), (4, 60)),
    "24_prompts_16_responses_4_to_60": groups(24, 16, (20, 60), (4, 60)),
    "1_prompt_of_1024_8_responses_of_256": groups(1, 8, (1024, 1024), (256, 256)),
    "varlen_2_of_2048": PrefixLayout.from_lengths([2048, 2048]),
}


def loop(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout) -> Tensor:
    """One torch attention per segment; a response's keys are its prompt's and its own, copied together."""
    lengths = layout.lengths()
    qs, ks, vs = (x.split(lengths) for x in (q, k, v))
    outs = []
    for segment, parent in enumerate(layout.parent.tolist()):
        key, value, mask = ks[segment], vs[segment], None
        if parent >= 0:
            key, value = torch.cat([ks[parent], key]), torch.cat([vs[parent], value])
            mask = torch.ones(lengths[segment], len(key), dtype=torch.bool).tril(lengths[parent])
        batch = (x[None].transpose(1, 2) for x in (qs[segment], key, value))
        out = F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def duplicated(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout) -> tuple[PrefixLayout, list[Tensor]]:
    """The same work for a trainer that repeats the prompt in front of every response."""
    bounds, lengths, spans, sizes = layout.offsets.tolist(), layout.lengths(), [], []
    for segment, parent in enumerate(layout.parent.tolist()):
        if parent >= 0:
            spans += [torch.arange(bounds[s], bounds[s + 1]) for s in (parent, segment)]
            sizes.append(lengths[parent] + lengths[segment])
    rows = torch.cat(spans)
    return PrefixLayout.from_lengths(sizes), [x.detach()[rows].requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("load", LOADS)
def test_prefix_attention(load: str, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    layout = LOADS[load]
    tokens = int(layout.offsets[-1])
    leaves = [torch.randn(tokens, heads, DIM, requires_grad=True) for heads in (HQ, HK, HK)]
    mask = layout.dense_mask(tokens)

    def timed(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        if step == "forward":
            return lambda: function(*inputs)
        grad = torch.randn_like(inputs[0])
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[None].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    torch.testing.assert_close(prefix_attention(*leaves, layout), loop(*leaves, layout), rtol=0, atol=1e-5)
    rivals = {"SDPA per segment": timed(lambda *x: loop(*x, layout), leaves)}
    if tokens < 6000:
        rivals["SDPA dense mask"] = timed(dense, leaves)
    if (layout.parent >= 0).any():
        flat, copies = duplicated(*leaves, layout)
        rivals["ours, prompt repeated"] = timed(lambda *x: prefix_attention(*x, flat), copies)

    # Pairs that the mask allows; two products forward, five backward.
    flops = 4 * DIM * HQ * int(mask.sum())
    heads = 2 * HQ + 2 * HK
    size = tokens * (heads * DIM + HQ) * 4
    if step == "forward_backward":
        flops += flops * 5 // 2
        size += tokens * (4 * (HQ + HK) * DIM + HQ) * 4
    contest(timed(lambda *x: prefix_attention(*x, layout), leaves), rivals, bytes_moved=size, flops=flops)
