"""prefix_attention: many short responses under shared prompts, few long ones, plain varlen, and a whole decoder layer.

The rivals see the same tokens: torch's attention per segment or under a dense mask, FlexAttention under the same mask,
and varlen kernels (torch's, FlashAttention-4's) on prompts that are repeated in front of every response.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels._machine import DEVICE, DTYPE, ON_GPU, on
from r4b_kernels import PrefixLayout, prefix_attention, rms_norm, swiglu

HQ, HK, DIM = on((4, 2, 32), (32, 8, 128))
Lengths = tuple[list[int], list[int]]


def groups(count: int, prompt: tuple[int, int], *responses: tuple[int, tuple[int, int]]) -> Lengths:
    """``count`` prompts of a length in a range, each with so many responses of a length in a range (several kinds)."""
    draw = random.Random(0)
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(count):
        owner = len(lengths)
        lengths.append(draw.randint(*prompt))
        parents.append(-1)
        for number, span in responses:
            lengths += [draw.randint(*span) for _ in range(number)]
            parents += [owner] * number
    return lengths, parents


LOADS: dict[str, Lengths] = on(
    {
        "9_prompts_16_responses_4_to_60": groups(9, (20, 60), (16, (4, 60))),
        "24_prompts_16_responses_4_to_60": groups(24, (20, 60), (16, (4, 60))),
        "1_prompt_of_1024_8_responses_of_256": groups(1, (1024, 1024), (8, (256, 256))),
        "varlen_2_of_2048": ([2048, 2048], [-1, -1]),
    },
    {
        "P4096_8_of_1500_8_of_120": groups(1, (4096, 4096), (8, (1500, 1500)), (8, (120, 120))),
        "4_P1200_8_of_512_8_of_32": groups(4, (1200, 1200), (8, (512, 512)), (8, (32, 32))),
        "64_prompts_16_responses_4_to_60": groups(64, (20, 60), (16, (4, 60))),
        "varlen_16_documents_of_2048": ([2048] * 16, [-1] * 16),
        "varlen_1_document_of_16384": ([16384], [-1]),
    },
)


def allowed_pairs(lengths: Sequence[int], parents: Sequence[int]) -> int:
    """(query, key) pairs that the mask allows."""
    return sum(n * (n + 1) // 2 + (n * lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents, strict=True))


def loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], parents: list[int]) -> Tensor:
    """One torch attention per segment; a response's keys are its prompt's and its own, copied together."""
    qs, ks, vs = (x.split(lengths) for x in (q, k, v))
    outs = []
    for segment, parent in enumerate(parents):
        key, value, mask = ks[segment], vs[segment], None
        if parent >= 0:
            key, value = torch.cat([ks[parent], key]), torch.cat([vs[parent], value])
            mask = torch.ones(lengths[segment], len(key), dtype=torch.bool).tril(lengths[parent])
        batch = (x[None].transpose(1, 2) for x in (qs[segment], key, value))
        out = F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def repeated(lengths: list[int], parents: list[int]) -> tuple[list[int], Tensor]:
    """(lengths, rows of the stream) for a trainer that repeats the prompt in front of every response."""
    starts = torch.tensor([0, *lengths], device="cpu").cumsum(0).tolist()
    owners, spans, sizes = set(parents), [], []
    for segment, parent in enumerate(parents):
        if parent < 0 and segment in owners:
            continue
        pieces = [segment] if parent < 0 else [parent, segment]
        spans += [torch.arange(starts[s], starts[s + 1]) for s in pieces]
        sizes.append(sum(lengths[s] for s in pieces))
    return sizes, torch.cat(spans)


@cache
def flex_attention(load: str) -> Callable[..., Tensor]:
    """Compiled FlexAttention under the load's mask, element by element as its users write it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, parents = LOADS[load]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parent = torch.tensor(parents)[segment]

    def mask(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own = (segment[row] == segment[column]) & (row >= column)
        return own | (parent[row] == segment[column])

    blocks = create_block_mask(mask, None, None, sum(lengths), sum(lengths), device=DEVICE, _compile=ON_GPU)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[None].transpose(1, 2) for x in (q, k, v))
        return compiled(*batch, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return run


def torch_varlen(sizes: list[int]) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor([0, *sizes]).cumsum(0).int()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # torch 2.11's kernel takes as many key heads as query heads.
        k, v = (x.repeat_interleave(HQ // HK, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, offsets, offsets, max(sizes), max(sizes), window_size=(-1, 0))

    return run


def cudnn(sizes: list[int]) -> Callable[..., Tensor]:
    """One call of cuDNN's attention per sequence, through torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return loop(q, k, v, sizes, [-1] * len(sizes))

    return run


def flash_attention_4(sizes: list[int]) -> Callable[..., Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    offsets = torch.tensor([0, *sizes]).cumsum(0).int()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def trained(function: Callable[..., Tensor], inputs: Sequence[Tensor], step: str) -> Callable[[], object]:
    if step == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    grad = torch.randn(len(inputs[0]), *function(*(x.detach() for x in inputs)).shape[1:], dtype=DTYPE)
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("load", LOADS)
def test_prefix_attention(load: str, step: str, contest: Callable[..., None]) -> None:
    torch.manual_seed(0)
    lengths, parents = LOADS[load]
    layout = PrefixLayout.from_lengths(lengths, parents, device=DEVICE)
    tokens = sum(lengths)
    leaves = [torch.randn(tokens, heads, DIM, dtype=DTYPE, requires_grad=True) for heads in (HQ, HK, HK)]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[None].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    tolerance = on(1e-5, 3e-2)
    ours = prefix_attention(*leaves, layout)
    torch.testing.assert_close(ours, loop(*leaves, lengths, parents), rtol=0, atol=tolerance)
    rivals = {"SDPA per segment": trained(lambda *x: loop(*x, lengths, parents), leaves, step)}
    skipped, ideal = {}, {}
    if tokens < 6000:
        mask = layout.dense_mask(tokens)
        rivals["SDPA dense mask"] = trained(dense, leaves, step)
    sizes, rows = repeated(lengths, parents)
    copies = [x.detach()[rows].requires_grad_() for x in leaves]
    if len(rows) != tokens:
        flat = PrefixLayout.from_lengths(sizes, device=DEVICE)
        rivals["ours, prompt repeated"] = trained(lambda *x: prefix_attention(*x, flat), copies, step)
        ideal["ours, prompt repeated"] = allowed_pairs(sizes, [-1] * len(sizes)) / allowed_pairs(lengths, parents)
    if ON_GPU:
        rivals["FlexAttention"] = lambda: trained(flex_attention(load), leaves, step)()
        rivals["cuDNN per sequence, prompt repeated"] = lambda: trained(cudnn(sizes), copies, step)()
        rivals["torch varlen_attn, prompt repeated"] = lambda: trained(torch_varlen(sizes), copies, step)()
        if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
            rivals["FlashAttention-4, prompt repeated"] = trained(flash_attention_4(sizes), copies, step)
        else:
            skipped["FlashAttention-4"] = "not installed"

    flops = 4 * DIM * HQ * allowed_pairs(lengths, parents)  # two products forward, five backward
    width = leaves[0].element_size()
    size = tokens * ((2 * HQ + 2 * HK) * DIM * width + HQ * 4)
    if step == "forward_backward":
        flops += flops * 5 // 2
        size += tokens * (4 * (HQ + HK) * DIM * width + HQ * 4)
    mine = trained(lambda *x: prefix_attention(*x, layout), leaves, step)
    contest(mine, rivals, bytes_moved=size, flops=flops, skipped=skipped, ideal=ideal)


class Layer(torch.nn.Module):
    """A decoder layer without positions: what a token costs besides attention."""

    def __init__(self, width: int, feed: int) -> None:
        super().__init__()
        self.heads = (HQ, HK, HK)
        self.norms = torch.nn.ParameterList(torch.ones(width, dtype=DTYPE) for _ in range(2))
        shapes = [(width, (HQ + 2 * HK) * DIM), (HQ * DIM, width), (width, 2 * feed), (feed, width)]
        self.matrices = torch.nn.ParameterList(torch.randn(*shape, dtype=DTYPE) / shape[0] ** 0.5 for shape in shapes)

    def forward(self, x: Tensor, layout: PrefixLayout) -> Tensor:
        qkv, out, up, down = self.matrices
        heads = (rms_norm(x, self.norms[0]) @ qkv).view(len(x), sum(self.heads), DIM).split(self.heads, dim=1)
        x = x + prefix_attention(*heads, layout).flatten(1) @ out
        return x + swiglu(rms_norm(x, self.norms[1]) @ up) @ down

    def flops(self, lengths: Sequence[int], parents: Sequence[int]) -> int:
        """Forward; three times that with the backward."""
        return 2 * sum(lengths) * sum(m.numel() for m in self.matrices) + 4 * DIM * HQ * allowed_pairs(lengths, parents)


def test_decoder_layer(contest: Callable[..., None]) -> None:
    """P = 1200, 8 thinking responses of 512 tokens and 8 direct of 32: at least 0.85 of the ideal FLOP ratio."""
    torch.manual_seed(0)
    lengths, parents = groups(1, (1200, 1200), (8, (512, 512)), (8, (32, 32)))
    sizes, rows = repeated(lengths, parents)
    layer = Layer(*on((256, 768), (4096, 12288)))
    x = torch.randn(sum(lengths), layer.norms[0].numel(), dtype=DTYPE)
    loads = {
        "shared": (x, PrefixLayout.from_lengths(lengths, parents, device=DEVICE)),
        "repeated": (x[rows], PrefixLayout.from_lengths(sizes, device=DEVICE)),
    }

    def step(load: str) -> Callable[[], object]:
        tokens, layout = loads[load]
        leaf = tokens.clone().requires_grad_()
        leaves = [leaf, *layer.parameters()]
        grad = torch.randn_like(tokens)
        return lambda: torch.autograd.grad(layer(leaf, layout), leaves, grad)

    flops = layer.flops(lengths, parents)
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    contest(
        step("shared"),
        {"prompt repeated": step("repeated")},
        bytes_moved=3 * weights + 6 * x.nbytes,
        flops=3 * flops,
        ideal={"prompt repeated": layer.flops(sizes, [-1] * len(sizes)) / flops},
    )
