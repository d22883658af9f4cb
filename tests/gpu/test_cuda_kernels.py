"""The CUDA C++ backends on a GPU of compute capability 9.0, against the definitions.

R4B_BUILD_CUDA=1 python -m r4b_kernels.build && pytest -m gpu tests/gpu/test_cuda_kernels.py
"""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import r4b_kernels as K
from r4b_kernels import PrefixLayout, native
from r4b_kernels._varlen_schedule import Schedule
from r4b_kernels.group_advantage import BASELINES
from r4b_kernels.prefix_attention.cuda import Backend, schedule

DEVICE = torch.device("cuda")
OBSTACLE = native.cuda_available(DEVICE) if torch.cuda.is_available() else "there is no GPU"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(OBSTACLE is not None, reason=f"the cuda object: {OBSTACLE}")]


def bi_mode_group() -> PrefixLayout:
    """A prompt with eight long and eight short answers, one without, and an empty segment."""
    lengths = [1200, *[700] * 8, *[60] * 8, 900, 0, 333, 1, 129]
    return PrefixLayout.from_lengths(lengths, [-1, *[0] * 16, -1, -1, 17, 17, -1], device=DEVICE)


def random_layout(seed: int) -> PrefixLayout:
    choose = random.Random(seed)
    lengths = [choose.choice((0, 1, choose.randrange(2000), choose.randrange(200))) for _ in range(60)]
    parents: list[int] = []
    for _ in lengths:
        roots = [i for i, owner in enumerate(parents) if owner == -1]
        parents.append(choose.choice([-1, *roots[-2:], *roots[-1:] * 3]))
    return PrefixLayout.from_lengths(lengths, parents, device=DEVICE)


def qkv(tokens: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, dim, device=DEVICE, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_schedule_is_that_of_triton(seed: int, rows: int) -> None:
    layout = random_layout(seed)
    tokens = int(layout.offsets[-1]) + 300
    ours = schedule(layout.offsets, layout.parent, tokens, rows)
    theirs = Schedule(layout.offsets, layout.parent, tokens, True).queries(rows)
    live = ours[:, 0] < ours[:, 1]
    assert sorted(ours[live].tolist()) == sorted(theirs[theirs[:, 0] < theirs[:, 1]].tolist())
    assert not live[int(live.sum()) :].any()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", [bi_mode_group, lambda: random_layout(1), lambda: random_layout(2)])
def test_attention(dim: int, layout) -> None:
    cut = layout()
    live = int(cut.offsets[-1])
    q, k, v = qkv(live + 77, 8, 2, dim)
    for x in (q, k, v):
        x[live:] = math.nan
    out, lse = K.prefix_attention(q, k, v, cut, return_lse=True, backend="cuda")
    again, again_lse = K.prefix_attention(q, k, v, cut, return_lse=True, backend="cuda")
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    assert (out[live:] == 0).all() and (lse[live:] == -math.inf).all()
    q, k, v = (x[:live] for x in (q, k, v))
    truth, true_lse = K.prefix_attention(*(x.double() for x in (q, k, v)), cut, return_lse=True, backend="reference")
    batch = (x[None].transpose(1, 2) for x in (q, k, v))
    torchs = F.scaled_dot_product_attention(*batch, attn_mask=cut.dense_mask(live), enable_gqa=True)[0].transpose(0, 1)
    assert (out[:live] - truth).norm() <= 1.5 * (torchs - truth).norm()
    assert (lse[:live] - true_lse).abs().max() < 1e-5


def test_attention_on_strided_inputs() -> None:
    """Slices of a fused projection are read in place; what TMA cannot walk is copied."""
    layout = bi_mode_group()
    tokens = int(layout.offsets[-1])
    fused = torch.randn(tokens, 12 * 128 + 8, device=DEVICE, dtype=torch.bfloat16)
    for columns in (fused[:, :-8], fused[:, 1:-7]):
        q, k, v = columns.unflatten(1, (12, 128)).split([8, 2, 2], dim=1)
        plain = K.prefix_attention(*(x.contiguous() for x in (q, k, v)), layout, backend="cuda")
        assert torch.equal(K.prefix_attention(q, k, v, layout, backend="cuda"), plain)


def test_attention_trains() -> None:
    """The backward is Triton's, from this forward's output and log-sum-exp."""
    layout = bi_mode_group()
    grads = []
    for backend in ("cuda", "triton"):
        inputs = [x.requires_grad_() for x in qkv(int(layout.offsets[-1]), 8, 2, 128)]
        K.prefix_attention(*inputs, layout, backend=backend).float().square().sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_attention_takes_the_schedule_of_triton() -> None:
    layout = bi_mode_group()
    tokens = int(layout.offsets[-1])
    q, k, v = qkv(tokens, 8, 2, 128)
    tiles = Schedule(layout.offsets, layout.parent, tokens, True).queries(128)
    out, lse = torch.empty_like(q), q.new_empty(tokens, 8, dtype=torch.float32)
    torch.ops.r4b_native.prefix_attention(q, k, v, layout.offsets, tiles, 128**-0.5, out, lse)
    assert torch.equal(out, K.prefix_attention(q, k, v, layout, backend="cuda"))


def test_attention_is_captured_in_a_graph() -> None:
    layout = bi_mode_group()
    q, k, v = qkv(int(layout.offsets[-1]), 8, 2, 128)
    eager = K.prefix_attention(q, k, v, layout, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = K.prefix_attention(q, k, v, layout, backend="cuda")
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.parametrize(("offsets", "parents"), [([0, 5, 3], [-1, -1]), ([0, 900], [-1]), ([0, 5, 9], [1, -1])])
def test_malformed_layouts(offsets: list[int], parents: list[int]) -> None:
    tensors = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (offsets, parents))
    q, k, v = qkv(300, 2, 1, 64)
    out, lse = K.prefix_attention(q, k, v, PrefixLayout(*tensors), return_lse=True, backend="cuda")
    assert out.isnan().all() and lse.isnan().all()


def test_what_the_kernel_cannot_do() -> None:
    layout = bi_mode_group()
    q, k, v = qkv(int(layout.offsets[-1]), 2, 1, 64)
    assert Backend.refuses(q.float()) is not None and Backend.refuses(q[..., :32]) is not None
    with pytest.raises(ValueError, match="scale=-1.0"):
        K.prefix_attention(q, k, v, layout, scale=-1.0, backend="cuda")


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_advantage(baseline: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = torch.cat([torch.tensor([0, 1, 2, 700]), torch.full((250,), 16)])
    offsets = torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(torch.int32).to(DEVICE)
    rows = int(sizes.sum())
    rewards = torch.randint(0, 3, (rows,), device=DEVICE).to(dtype)
    rewards[-32:] = 1
    mode = torch.randint(0, 2, (rows,), device=DEVICE)
    lengths = torch.randint(0, 200, (rows,), device=DEVICE)
    tokens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    options = {"baseline": baseline, "token_offsets": tokens, "num_tokens": int(tokens[-1])}
    ours, again, exact = (
        K.group_advantage(rewards, offsets, mode, **options, backend=backend)
        for backend in ("cuda", "cuda", "reference")
    )
    assert torch.allclose(ours.advantage, exact.advantage, rtol=2e-7, atol=0)
    assert torch.allclose(ours.token_advantage, exact.token_advantage, rtol=2e-7, atol=0)
    for name in ("live", "live_rows", "num_live"):
        assert torch.equal(getattr(ours, name), getattr(exact, name))
    for first, second in zip(ours, again, strict=True):
        assert torch.equal(first, second)
