"""policy_loss_head against autograd of its definition, against Liger's loss, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import head_chunks, linear_logprob, policy_loss_head
from r4b_kernels.policy_loss_head import reference
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

BACKENDS = ["cpu", "reference"]
SHAPES = [(1, 1, 2), (7, 5, 3), (37, 11, 53), (129, 33, 257)]


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict]:
    """A head and rows in which every branch of the loss occurs: clipped both ways, idle, masked, and plain."""
    hidden = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(vocabulary, width, dtype=dtype) / width**0.5
    target = torch.randint(vocabulary, (tokens,))
    with torch.no_grad():
        logprob, _ = linear_logprob(hidden, weight, target, backend="reference")
    rows = {
        "target": target,
        "old_logprob": logprob + 0.4 * torch.randn(tokens),
        "advantage": torch.randn(tokens, dtype=logprob.dtype),
        "row_weight": torch.rand(tokens, dtype=logprob.dtype),
        "ref_logprob": logprob + 0.4 * torch.randn(tokens),
    }
    rows["target"][tokens // 3 :: 9] = -100
    rows["row_weight"][tokens // 3 + 1 :: 9] = 0.0
    rows["advantage"][tokens // 3 + 2 :: 9] = 0.0
    return hidden, weight, rows


def formula(hidden: Tensor, weight: Tensor, rows: dict, temperature: float, kl_coef: float, low=0.2, high=0.28):
    """The loss as the documentation states it, on linear_logprob, over the rows that have one."""
    logprob, _ = linear_logprob(hidden, weight, rows["target"], temperature=temperature, backend="reference")
    use = (rows["target"] >= 0) & (rows["row_weight"] != 0)
    logprob, old, advantage = logprob[use], rows["old_logprob"][use], rows["advantage"][use]
    ratio = torch.exp(logprob - old)
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    gap = rows["ref_logprob"][use] - logprob
    return (rows["row_weight"][use] * (kl_coef * (gap.exp() - gap - 1) - surrogate)).sum()


def ours(hidden: Tensor, weight: Tensor, rows: dict, temperature: float, kl_coef: float, backend: str | None = None):
    return policy_loss_head(
        hidden, weight, **rows, clip_low=0.2, clip_high=0.28, kl_coef=kl_coef, temperature=temperature, backend=backend
    )


def test_a_second_derivative_is_refused() -> None:
    """Its gradient is a constant to autograd, so that a second derivative would be silently wrong."""
    hidden, weight, rows = make(7, 5, 3)
    loss = ours(hidden.requires_grad_(), weight, rows, 1.0, 0.05).loss
    with pytest.raises(NotImplementedError, match="policy_loss_head has no second derivative.*create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["old_logprob", "advantage", "row_weight", "ref_logprob"])
def test_a_row_elsewhere_is_refused(name: str) -> None:
    hidden, weight, rows = make(7, 5, 3)
    with pytest.raises(ValueError, match=f"{name} is on meta and hidden on cpu"):
        ours(hidden, weight, rows | {name: rows[name].to("meta")}, 1.0, 0.05)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_formula(shape, temperature: float, kl_coef: float, backend: str, small_chunks) -> None:
    hidden, weight, rows = make(*shape)
    seed = [torch.tensor(-2.5, dtype=torch.float64)]
    mine = results_and_gradients(
        lambda h, w: ours(h, w, rows, temperature, kl_coef, backend).loss, (hidden, weight), seed
    )
    exact = results_and_gradients(lambda h, w: formula(h, w, rows, temperature, kl_coef), (hidden, weight), seed)
    assert_close(mine, exact, 1e-12)


def test_every_branch_is_in_the_test_data() -> None:
    hidden, weight, rows = make(129, 33, 257)
    result = ours(hidden, weight, rows, 1.0, 0.0)
    positive = rows["advantage"] > 0
    for branch in (positive & result.clipped, ~positive & result.clipped, positive & ~result.clipped):
        assert branch.sum() > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend: str) -> None:
    hidden, weight, rows = make(37, 11, 53)
    hidden.requires_grad_()
    result = ours(hidden, weight, rows, 0.8, 0.1, backend)
    logprob, entropy = linear_logprob(hidden, weight, rows["target"], temperature=0.8, backend="reference")
    torch.testing.assert_close(result.logprob, logprob.detach())
    torch.testing.assert_close(result.entropy, entropy.detach())
    use = (rows["target"] >= 0) & (rows["row_weight"] != 0)
    ratio = torch.exp(logprob - rows["old_logprob"]).detach()
    torch.testing.assert_close(result.ratio, torch.where(use, ratio, 1.0))
    gap = (rows["ref_logprob"] - logprob).detach()
    torch.testing.assert_close(result.kl, torch.where(use, gap.exp() - gap - 1, 0.0))
    high, low = (rows["advantage"] > 0) & (ratio > 1.28), (rows["advantage"] < 0) & (ratio < 0.8)
    assert torch.equal(result.clipped, use & (high | low))
    assert [value.requires_grad for value in result] == [True] + [False] * 5


def test_float32_is_accurate() -> None:
    hidden, weight, rows = make(150, 64, 1000, torch.float32)
    seed = [torch.tensor(1.0)]
    mine = results_and_gradients(lambda h, w: ours(h, w, rows, 1.0, 0.05).loss, (hidden, weight), seed)
    double = {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
    exact = results_and_gradients(
        lambda h, w: formula(h, w, double, 1.0, 0.05), (hidden.double(), weight.double()), seed
    )
    assert_close(mine, exact, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_no_worse_than_torch(backend: str) -> None:
    """Old log-probabilities far from a clip boundary, where rounding could flip a branch."""
    hidden, weight, rows = make(192, 64, 1000, torch.bfloat16)
    with torch.no_grad():
        rows["old_logprob"] = linear_logprob(hidden.double(), weight.double(), rows["target"])[0].float()
    seed = [torch.tensor(1.0)]

    def torch_own(h: Tensor, w: Tensor) -> Tensor:
        log_p = F.linear(h, w).float().log_softmax(-1)
        logprob = log_p.gather(1, rows["target"].clamp_min(0)[:, None]).squeeze(1)
        named = reference.Rows(*rows.values())
        return reference.row_terms(logprob, named, reference.Objective(0.2, 0.28, 0.05, 1.0)).loss.sum()

    mine = results_and_gradients(lambda h, w: ours(h, w, rows, 1.0, 0.05, backend).loss, (hidden, weight), seed)
    rival = results_and_gradients(torch_own, (hidden, weight), seed)
    double = {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
    exact = results_and_gradients(
        lambda h, w: formula(h, w, double, 1.0, 0.05), (hidden.double(), weight.double()), seed
    )
    for name in ("gradient 0", "gradient 1"):
        assert_no_worse({name: mine[name]}, {name: rival[name]}, {name: exact[name]})
    assert abs(mine["output 0"] - exact["output 0"]) < 2e-2 * rows["row_weight"].sum()


def test_gradcheck() -> None:
    hidden, weight, rows = make(9, 4, 7)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: ours(h, w, rows, 0.7, 0.1).loss, (hidden, weight), fast_mode=True)


def test_gradient_written_out_equals_autograd() -> None:
    _, _, rows = make(200, 4, 7)
    logprob = (rows["ref_logprob"] + torch.randn(200, dtype=torch.float64)).requires_grad_()
    rows["old_logprob"][::5] += 25.0
    rows["ref_logprob"][::7] -= 25.0
    named, objective = reference.Rows(*rows.values()), reference.Objective(0.2, 0.3, 0.1, 1.0)
    (expected,) = torch.autograd.grad(reference.row_terms(logprob, named, objective).loss.sum(), logprob)
    torch.testing.assert_close(reference.row_gradient(logprob.detach(), named, objective), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_loss_may_hold_anything(poison: float, backend: str) -> None:
    hidden, weight, rows = make(37, 11, 53)
    seed = [torch.tensor(1.0)]
    clean = results_and_gradients(lambda h, w: ours(h, w, rows, 1.0, 0.1, backend).loss, (hidden, weight), seed)
    idle = (rows["target"] < 0) | (rows["row_weight"] == 0)
    masked = rows["target"] < 0
    for name in ("old_logprob", "advantage", "ref_logprob"):
        rows[name][idle] = poison
    rows["row_weight"][masked] = poison
    dirty_hidden = hidden.clone()
    dirty_hidden[masked] = poison
    dirty = results_and_gradients(lambda h, w: ours(h, w, rows, 1.0, 0.1, backend).loss, (dirty_hidden, weight), seed)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name
    for name, value in ours(dirty_hidden, weight, rows, 1.0, 0.1, backend)._asdict().items():
        assert bool(torch.isfinite(value).all()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_policies_stay_finite(backend: str) -> None:
    """Log-differences of 500: finite loss, and no gradient beyond the clamp."""
    hidden, weight, rows = make(12, 4, 7, torch.float32)
    rows["row_weight"].fill_(1.0)
    rows["target"].clamp_(min=0)
    for name, value in (("old_logprob", -500.0), ("ref_logprob", 500.0)):
        rows[name] = torch.full((12,), value)
    hidden.requires_grad_()
    result = ours(hidden, weight, rows, 1.0, 0.1, backend)
    result.loss.backward()
    assert bool(torch.isfinite(result.loss)) and not hidden.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_row(tokens: int, backend: str) -> None:
    hidden, weight, rows = make(tokens, 4, 7)
    rows["row_weight"].zero_()
    mine = results_and_gradients(
        lambda h, w: ours(h, w, rows, 1.0, 0.1, backend).loss, (hidden, weight), [torch.ones(())]
    )
    assert mine["output 0"] == 0 and not mine["gradient 0"].any() and not mine["gradient 1"].any()
    assert mine["gradient 1"].shape == weight.shape


def test_dead_rows_take_no_backward_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked, weightless, advantage-free and clipped rows never reach the gradient accumulator."""
    hidden, weight, rows = make(129, 33, 257)
    seen = 0
    add = head_chunks.GradientAccumulator.add

    def counting(self, index: Tensor, *rest: Tensor) -> None:
        nonlocal seen
        seen += index.numel()
        add(self, index, *rest)

    monkeypatch.setattr(head_chunks.GradientAccumulator, "add", counting)
    result = ours(hidden.requires_grad_(), weight, rows, 1.0, 0.0)
    live = (rows["target"] >= 0) & (rows["row_weight"] != 0) & (rows["advantage"] != 0) & ~result.clipped
    assert seen == live.sum() and 0 < seen < 100
    seen = 0
    with torch.no_grad():
        ours(hidden, weight, rows, 1.0, 0.0)
    assert seen == 0


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_second_backward_gives_the_same_gradient(dtype: torch.dtype, train_weight: bool) -> None:
    """The first scales the kept gradients in place; the second must not find them scaled."""
    hidden, weight, rows = make(37, 11, 53, dtype)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())[: 1 + train_weight]
    loss = 3.0 * ours(hidden, weight.requires_grad_(train_weight), rows, 1.0, 0.1).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2.0 * loss, leaves)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one)
    assert train_weight or weight.grad is None


def test_runs_repeat_bit_by_bit() -> None:
    hidden, weight, rows = make(300, 32, 1001, torch.float32)
    seed = [torch.tensor(1.0)]
    runs = [
        results_and_gradients(lambda h, w: ours(h, w, rows, 1.0, 0.1).loss, (hidden, weight), seed) for _ in range(2)
    ]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_operator_contract() -> None:
    """The check compares outputs after a backward, which scales two of them in place: by 1, the loss being positive."""
    hidden, weight, rows = make(5, 4, 6)
    rows["advantage"] = -rows["advantage"].abs()
    for backend in (None, "reference"):
        for train in (False, True):
            leaves = hidden.detach().requires_grad_(train), weight.detach().requires_grad_(train)
            scalars = (0.2, 0.3, 0.1, 0.7, None, train, train, backend)
            torch.library.opcheck(torch.ops.r4b_kernels.policy_loss_head.default, (*leaves, *rows.values(), *scalars))


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, rows = make(12, 8, 10)
    seed = [torch.tensor(1.0)]
    compiled = torch.compile(lambda h, w: ours(h, w, rows, 1.0, 0.1).loss, backend="aot_eager", fullgraph=True)
    mine = results_and_gradients(compiled, (hidden, weight), seed)
    assert_close(mine, results_and_gradients(lambda h, w: formula(h, w, rows, 1.0, 0.1), (hidden, weight), seed), 1e-12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"old_logprob": torch.zeros(3)}, "old_logprob"),
        ({"advantage": torch.zeros(4, dtype=torch.int64)}, "advantage"),
        ({"row_weight": torch.zeros(4, 1)}, "row_weight"),
        ({"ref_logprob": torch.zeros(5)}, "ref_logprob"),
        ({"target": torch.full((4,), 5)}, "target has the id 5"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logprob"),
        ({"temperature": -1.0}, "temperature"),
        ({"backend": "abacus"}, "backend"),
    ],
)
def test_errors_name_the_argument(change: dict, named: str) -> None:
    rows = {name: torch.zeros(4) for name in ("old_logprob", "advantage", "row_weight")}
    head = {"hidden": torch.randn(4, 3), "weight": torch.randn(5, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=named):
        policy_loss_head(**(head | rows | change))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_agrees_with_liger(loss_type: str) -> None:
    """Its four clipped losses: a mean over sequences, over tokens (twice), and a constant."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is an oracle, not a dependency")
    sequences, length, width, vocabulary = 3, 11, 16, 61
    hidden, weight, rows = make(sequences * length, width, vocabulary, torch.float32)
    rows["target"].clamp_(min=0)
    mask = (torch.arange(length) < torch.tensor([11, 4, 7])[:, None]).float()
    per_sequence = torch.randn(sequences)
    rows["advantage"] = per_sequence.repeat_interleave(length)
    share = {"grpo": mask.sum(-1, keepdim=True) * sequences, "dr_grpo": torch.tensor(sequences * 20.0)}
    rows["row_weight"] = (mask / share.get(loss_type, mask.sum())).flatten()
    theirs_module = chunked.LigerFusedLinearGRPOLoss(
        beta=0.05,
        compiled=False,
        use_ref_model=True,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type=loss_type,
        max_completion_length=20,
        temperature=0.7,
    )
    shape = (sequences, length)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        return theirs_module(
            h.view(*shape, width),
            w,
            rows["target"].view(shape),
            mask,
            per_sequence,
            ref_per_token_logps=rows["ref_logprob"].view(shape),
            old_per_token_logps=rows["old_logprob"].view(shape),
        )[0]

    seed = [torch.tensor(1.0)]
    mine = results_and_gradients(lambda h, w: ours(h, w, rows, 0.7, 0.05).loss, (hidden, weight), seed)
    assert_close(mine, results_and_gradients(theirs, (hidden, weight), seed), 2e-5)
