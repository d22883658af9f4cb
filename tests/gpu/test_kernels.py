"""Every Triton backend on a GPU, at real shapes: against the truth, against torch's own error, and twice.

    pytest -m gpu tests/gpu                          on a machine with a GPU
    TRITON_INTERPRET=1 pytest -m gpu tests/gpu       a rehearsal at toy shapes, on the CPU

float32 must be within 1e-5 of the definition in float64, bfloat16 at most 1.5 times as far from it as torch's own
bfloat16 computation is, and a second run must give the same bits. float64 truths are computed on the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import r4b_kernels as K
from r4b_kernels import PrefixLayout
from tests.kernels.head_cases import assert_no_worse, relative, results_and_gradients

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

pytestmark = pytest.mark.gpu


def on(cpu: int, gpu: int) -> int:
    return gpu if ON_GPU else cpu


@dataclass
class Case:
    """One op on inputs in float64: ``call(backend)`` and torch's own way, both functions of the inputs."""

    inputs: tuple[Tensor, ...]
    call: Callable[[str], Callable[..., object]]
    composed: Callable[..., object]
    float32: float = 1e-5
    seeds: list[Tensor] = field(default_factory=list)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def rms_norm(width: int) -> Case:
    def composed(x: Tensor, weight: Tensor) -> Tensor:
        exact = x.float() if x.dtype != torch.float64 else x
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    inputs = normal(on(7, 8192), width), normal(width)
    return Case(inputs, lambda backend: lambda x, w: K.rms_norm(x, w, backend=backend), composed)


def swiglu() -> Case:
    def composed(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return Case(
        (normal(on(5, 4096), 2 * on(70, 12288)),), lambda backend: lambda x: K.swiglu(x, backend=backend), composed
    )


def merge_norm(norm_merged: bool) -> Case:
    width, merge = on(24, 1152), 4
    span = merge * width if norm_merged else width

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.view(-1, span)
        return F.layer_norm(rows, (span,), weight, bias, 1e-6).view(-1, merge * width)

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda x, w, b: K.merge_norm(x, w, b, merge=merge, norm_merged=norm_merged, eps=1e-6, backend=backend)

    return Case((normal(merge * on(3, 4096), width), normal(span), normal(span)), call, composed)


def scatter_vision(accumulate: bool) -> Case:
    tokens, patches, width = on(11, 16384), on(4, 9000), on(20, 4096)
    index = torch.full((tokens,), -1, device=DEVICE)
    places = torch.randperm(tokens, device=DEVICE)[:patches].sort().values
    index[places] = torch.arange(patches, device=DEVICE)

    def composed(embeddings: Tensor, features: Tensor) -> Tensor:
        out = embeddings.clone()
        out[places] = out[places] + features if accumulate else features
        return out

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda e, f: K.scatter_vision(e, f, index, accumulate=accumulate, backend=backend)

    return Case((normal(tokens, width), normal(patches, width)), call, composed)


def qk_norm_mrope() -> Case:
    tokens, hq, hk, dim = on(5, 8192), on(4, 32), on(2, 8), on(32, 128)
    positions = torch.randint(0, on(50, 4000), (3, tokens), device=DEVICE)
    sections = [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6]
    options = {"theta": 5e6, "sections": sections, "interleaved": True}
    pair = torch.arange(dim // 2, device=DEVICE)
    axis = torch.where(pair < 3 * (dim // 6), pair % 3, 0)
    angle = positions[axis].T * 5e6 ** (-2.0 * pair.double() / dim)
    angle = torch.cat([angle, angle], 1)[:, None]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        """As transformers writes it: cosines and sines in the dtype of x."""
        exact = x.float() if x.dtype != torch.float64 else x
        normed = weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        first, second = normed.chunk(2, -1)
        return normed * angle.cos().to(x.dtype) + torch.cat([-second, first], -1) * angle.sin().to(x.dtype)

    def composed(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q, q_weight), turned(k, k_weight)

    def call(backend: str) -> Callable[..., object]:
        return lambda q, k, qw, kw: K.qk_norm_mrope(q, k, qw, kw, positions, **options, backend=backend)

    inputs = normal(tokens, hq, dim), normal(tokens, hk, dim), normal(dim), normal(dim)
    # An angle is a float32 product: at position 4,000 off by up to 2.4e-4.
    return Case(inputs, call, composed, float32=on(1e-5, 1e-3))


def prefix_attention(dim: int, plain: bool = False) -> Case:
    hq, hk = 4, on(2, 1)
    lengths = [on(33, 1200), *[on(9, 512)] * on(2, 8), *[on(3, 33)] * on(2, 8), 0, 1, on(17, 700), on(5, 129)]
    prompts = len(lengths) - 5
    parents = [-1] * len(lengths) if plain else [-1, *[0] * (prompts), -1, -1, -1, len(lengths) - 2]
    layout = PrefixLayout.from_lengths(lengths, parents, device=DEVICE)
    tokens = sum(lengths)
    mask = layout.dense_mask(tokens)

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[None].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def call(backend: str) -> Callable[..., object]:
        return lambda q, k, v: K.prefix_attention(q, k, v, layout, backend=backend)

    return Case((normal(tokens, hq, dim), normal(tokens, hk, dim), normal(tokens, hk, dim)), call, composed)


def vision_attention(dim: int) -> Case:
    lengths = [on(7, 256), on(1, 64), 0, on(19, 1600), on(3, 65)]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x[None] for x in piece))[0] for piece in pieces]
        return torch.cat(outs, 1).transpose(0, 1)

    def call(backend: str) -> Callable[..., object]:
        return lambda q, k, v: K.vision_attention(q, k, v, cu_seqlens, backend=backend)

    return Case(tuple(normal(sum(lengths), 4, dim) for _ in range(3)), call, composed)


def head() -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, target; two rows are masked."""
    tokens, width, vocabulary = on(9, 1024), on(16, 1024), on(301, 151936)
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    target[[1, 5]] = -100
    return normal(tokens, width), normal(vocabulary, width, scale=width**-0.5), target


def linear_logprob() -> Case:
    hidden, weight, target = head()

    def composed(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        log_p = logits.log_softmax(-1)
        masked = target < 0
        logprob = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return logprob.masked_fill(masked, 0.0), entropy.masked_fill(masked, 0.0)

    def call(backend: str) -> Callable[..., object]:
        return lambda h, w: K.linear_logprob(h, w, target, backend=backend)

    return Case((hidden, weight), call, composed)


def policy_loss_head() -> Case:
    hidden, weight, target = head()
    rows = len(target)
    with torch.no_grad():
        logprob = (hidden @ weight.T).log_softmax(-1).gather(1, target.clamp_min(0)[:, None])[:, 0]
    old, reference = (logprob + 0.3 * normal(rows) for _ in range(2))
    advantage, row_weight = normal(rows), torch.rand(rows, dtype=torch.float64, device=DEVICE) / rows
    row_weight[3], advantage[4] = 0.0, 0.0

    def composed(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        now = logits.log_softmax(-1).gather(1, target.clamp_min(0)[:, None])[:, 0]
        ratio = (now - old).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        gap = reference - now
        loss = row_weight * (0.05 * (gap.exp() - gap - 1) - surrogate)
        return loss[target >= 0].sum()

    def call(backend: str) -> Callable[..., object]:
        data = old, advantage, row_weight
        options = {"ref_logprob": reference, "clip_high": 0.28, "kl_coef": 0.05, "backend": backend}
        return lambda h, w: K.policy_loss_head(h, w, target, *data, **options).loss

    return Case((hidden, weight), call, composed)


def linear_distill() -> Case:
    hidden, weight, target = head()
    rows, slots = len(target), on(3, 64)
    teacher = (normal(*hidden.shape) @ weight.T).log_softmax(-1)
    logprobs, ids = teacher.topk(slots)
    row_weight = torch.rand(rows, dtype=torch.float64, device=DEVICE) / rows
    row_weight[3] = 0.0

    def composed(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        log_q = logits.log_softmax(-1).gather(1, ids)
        log_q, log_t = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_q, logprobs))
        return (row_weight * (log_t.exp() * (log_t - log_q)).sum(1)).sum()

    def call(backend: str) -> Callable[..., object]:
        return lambda h, w: K.linear_distill(h, w, ids, logprobs, row_weight, backend=backend).loss

    return Case((hidden, weight), call, composed)


CASES: dict[str, Callable[[], Case]] = {
    "rms_norm": lambda: rms_norm(on(30, 4096)),
    "rms_norm-head": lambda: rms_norm(128),
    "swiglu": swiglu,
    "merge_norm": lambda: merge_norm(False),
    "merge_norm-merged": lambda: merge_norm(True),
    "scatter_vision": lambda: scatter_vision(False),
    "scatter_vision-accumulate": lambda: scatter_vision(True),
    "qk_norm_mrope": qk_norm_mrope,
    "prefix_attention-32": lambda: prefix_attention(32),
    "prefix_attention-64": lambda: prefix_attention(64),
    "prefix_attention-72": lambda: prefix_attention(72),
    "prefix_attention-96": lambda: prefix_attention(96),
    "prefix_attention-128": lambda: prefix_attention(128),
    "prefix_attention-128-varlen": lambda: prefix_attention(128, plain=True),
    "prefix_attention-256": lambda: prefix_attention(256),
    "vision_attention-64": lambda: vision_attention(64),
    "vision_attention-72": lambda: vision_attention(72),
    "vision_attention-80": lambda: vision_attention(80),
    "vision_attention-128": lambda: vision_attention(128),
    "linear_logprob": linear_logprob,
    "policy_loss_head": policy_loss_head,
    "linear_distill": linear_distill,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    made = CASES[request.param]()
    out = made.composed(*made.inputs)
    outs = out if isinstance(out, tuple) else (out,)
    made.seeds = [torch.randn_like(x) for x in outs]
    return made


def run(function: Callable, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return results_and_gradients(function, [x.to(dtype) for x in case.inputs], case.seeds)


def test_float32_is_the_definition(case: Case) -> None:
    exact = run(case.call("reference"), case, torch.float64)
    ours = run(case.call("triton"), case, torch.float32)
    for name, value in exact.items():
        assert (error := relative(ours[name], value)) <= case.float32, f"{name}: {error:.1e}"


def test_bfloat16_is_no_worse_than_torch(case: Case) -> None:
    rounded = Case(tuple(x.bfloat16().double() for x in case.inputs), case.call, case.composed, seeds=case.seeds)
    exact = run(case.call("reference"), rounded, torch.float64)
    ours = run(case.call("triton"), rounded, torch.bfloat16)
    # In the rehearsal's few elements luck decides.
    assert_no_worse(ours, run(case.composed, rounded, torch.bfloat16), exact, factor=1.5 if ON_GPU else 3.0)


def test_twice_gives_the_same_bits(case: Case) -> None:
    first, second = (run(case.call("triton"), case, torch.bfloat16) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("baseline", ["union", "per_mode", "leave_one_out"])
def test_group_advantage(baseline: str) -> None:
    groups, size = on(5, 256), 16
    rewards = torch.randint(0, 2, (groups * size,), device=DEVICE).float()
    rewards[:size] = 1.0
    mode = torch.arange(size, device=DEVICE).remainder(2).repeat(groups)
    offsets = torch.arange(0, groups * size + 1, size, device=DEVICE)
    tokens = torch.cat([torch.zeros(1), torch.randint(1, 50, (groups * size,)).cumsum(0)]).long().to(DEVICE)
    options = {"baseline": baseline, "token_offsets": tokens, "num_tokens": int(tokens[-1])}
    ours = K.group_advantage(rewards, offsets, mode, **options, backend="triton")
    exact = K.group_advantage(rewards.double(), offsets, mode, **options, backend="reference")
    assert relative(ours.advantage, exact.advantage) <= 1e-6
    assert relative(ours.token_advantage, exact.token_advantage) <= 1e-6
    assert torch.equal(ours.live, exact.live) and not ours.live[:size].any()
