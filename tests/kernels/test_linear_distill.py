"""linear_distill against autograd of its definition, against TRL's and Liger's losses, and at its edges."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r4b_kernels import head_chunks, linear_distill
from r4b_kernels.linear_distill import cpu, reference
from tests.kernels.distill_cases import DIVERGENCES, definition, double, make, with_gradients
from tests.kernels.head_cases import assert_close, assert_no_worse
from tests.kernels.linear_distill_worker import launch, run

BACKENDS = ["cpu", "reference"]
# T, H, V, K
SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (3, 2, 5, 1), (9, 5, 6, 6), (37, 11, 53, 7), (33, 9, 260, 64)]


def ours(hidden: Tensor, weight: Tensor, rows: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return with_gradients(lambda h, w: linear_distill(h, w, **rows, **options)._asdict(), hidden, weight)


def exact(hidden: Tensor, weight: Tensor, rows: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return with_gradients(lambda h, w: definition(h, w, rows, **options), hidden.double(), weight.double())


def all_alive(tokens: int, width: int, vocabulary: int, slots: int, dtype: torch.dtype = torch.float64):
    """make() without padded or dead rows, and the teacher's whole log-probabilities [T, V]."""
    hidden = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(vocabulary, width, dtype=dtype) / width**0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = (2 * torch.randn(tokens, vocabulary, dtype=wide)).log_softmax(-1)
    logprobs, ids = teacher.topk(slots)
    row_weight = torch.rand(tokens, dtype=wide)
    return hidden, weight, {"teacher_ids": ids, "teacher_logprobs": logprobs, "row_weight": row_weight}, teacher


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(head_chunks, "_MIN_ROWS", 10)
    monkeypatch.setattr(cpu, "_GATHER_ELEMENTS", 200)


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one of the cpu backend's two ways to do without a tail, whatever the sizes."""
    monkeypatch.setattr(cpu, "gathers", lambda slots, shard, objective: way == "gathered")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_definition(shape, divergence: str, backend: str, small_chunks) -> None:
    case, options = make(*shape), {"divergence": divergence, "beta": 0.3, "temperature": 0.7}
    assert_close(ours(*case, **options, backend=backend), exact(*case, **options), 1e-12)


@pytest.mark.parametrize("way", ["dense", "gathered", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_definition_without_tail(shape, divergence: str, way: str, small_chunks, monkeypatch) -> None:
    backend = "reference" if way == "reference" else "cpu"
    if backend == "cpu":
        go(way, monkeypatch)
    case, options = make(*shape), {"divergence": divergence, "beta": 0.8, "temperature": 1.4, "tail": False}
    assert_close(ours(*case, **options, backend=backend), exact(*case, **options), 1e-12)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_accurate(divergence: str, tail: bool) -> None:
    hidden, weight, rows = make(150, 64, 1000, 32, torch.float32)
    options = {"divergence": divergence, "tail": tail}
    mine, truth = ours(hidden, weight, rows, **options), exact(hidden, weight, double(rows), **options)
    assert_close(mine, truth, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_is_no_worse_than_torch(divergence: str, tail: bool, backend: str) -> None:
    hidden, weight, rows, _ = all_alive(192, 64, 1000, 16, torch.bfloat16)
    options = {"divergence": divergence, "tail": tail}

    def torch_own(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        log_p = F.linear(h, w).float().log_softmax(-1)
        log_q, log_t = log_p.gather(1, rows["teacher_ids"]), rows["teacher_logprobs"]
        if tail:
            log_q, log_t = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_q, log_t))
        else:
            log_q, log_t = log_q.log_softmax(1), log_t.log_softmax(1)
        log_m = (log_q.exp() / 2 + log_t.exp() / 2).log()

        def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
            return (log_a.exp() * (log_a - log_b)).sum(1)

        values = {
            "forward_kl": lambda: kl(log_t, log_q),
            "reverse_kl": lambda: kl(log_q, log_t),
            "jsd": lambda: (kl(log_t, log_m) + kl(log_q, log_m)) / 2,
        }
        value = values[divergence]()
        return {"loss": (rows["row_weight"] * value).sum(), "divergence": value}

    mine, rival = ours(hidden, weight, rows, **options, backend=backend), with_gradients(torch_own, hidden, weight)
    truth = exact(hidden, weight, double(rows), **options)
    assert_no_worse(mine, rival, {name: truth[name] for name in ("divergence", "hidden", "weight")})


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, tail: bool) -> None:
    hidden, weight, rows = make(9, 4, 7, 3)
    rows["row_weight"][hidden.isnan().any(1)] = 0.0
    hidden = hidden.nan_to_num(0.3).requires_grad_()
    weight.requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_distill(h, w, **rows, divergence=divergence, beta=0.6, temperature=0.7, tail=tail).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_slope_written_out_equals_autograd(divergence: str) -> None:
    objective = reference.Objective(divergence, 0.3, 1.0, True)
    logits = (3 * torch.randn(50, 9, dtype=torch.float64)).requires_grad_()
    log_t = (3 * torch.randn(50, 9, dtype=torch.float64)).log_softmax(1)
    used = torch.ones(50, 9, dtype=torch.bool)
    value, slope = reference.divergence_and_slope(logits.log_softmax(1), log_t, used, objective)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits)[0], slope.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mass", "divergence"),
    [(mass, each) for mass in ("one", "over one", "none", "tiny tail") for each in DIVERGENCES]
    + [("-inf", "forward_kl"), ("-inf", "jsd")],
)
def test_extreme_teachers(mass: str, divergence: str, backend: str) -> None:
    """The teacher's tail from nothing, with what rounding leaves of it, to everything."""
    hidden, weight, rows, _ = all_alive(8, 4, 9, 3)
    logprobs = torch.full((8, 3), {"one": -1000.0, "none": -60.0, "-inf": -2.0}.get(mass, 1 / 3.0))
    if mass in ("over one", "tiny tail"):
        logprobs = torch.tensor([0.5, 0.3, 0.2 + (0.01 if mass == "over one" else -3e-6)]).double().log().expand(8, 3)
    elif mass != "none":
        logprobs[:, 1] = 0.0 if mass == "one" else -torch.inf
    rows["teacher_logprobs"] = logprobs.double()
    mine = ours(hidden, weight, rows, divergence=divergence, backend=backend)
    assert_close(mine, exact(hidden, weight, rows, divergence=divergence), 1e-11)
    assert bool((mine["divergence"] >= 0).all())
    for name, value in mine.items():
        assert bool(torch.isfinite(value).all()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("sure", [True, False])
def test_extreme_students(sure: bool, divergence: str, backend: str) -> None:
    """Logits of 300 on the ids, or on all others: a tail of e^-300, and one of 1, in float32 (300 to 3e-5 there)."""
    hidden, weight, rows, _ = all_alive(8, 4, 9, 3, torch.float32)
    rows["teacher_ids"] = torch.arange(3).expand(8, 3).contiguous()
    hidden[:, 0] = 300.0
    weight[:, 0] = torch.where((torch.arange(9) < 3) == sure, 1.0, 0.0)
    mine = ours(hidden, weight, rows, divergence=divergence, backend=backend)
    truth = exact(hidden, weight, double(rows), divergence=divergence)
    torch.testing.assert_close(mine["student_mass"], truth.pop("student_mass").float())
    assert_close(mine, truth, 5e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_id_listed_is_the_whole_divergence(divergence: str) -> None:
    """With K=V there is no tail, asked for or not; forward KL is torch's own."""
    hidden, weight, rows, teacher = all_alive(20, 8, 31, 31)
    results = [ours(hidden, weight, rows, divergence=divergence, tail=tail) for tail in (True, False)]
    assert_close(results[0], results[1], 1e-12)
    if divergence == "forward_kl":
        whole = F.kl_div((hidden @ weight.T).log_softmax(-1), teacher, reduction="none", log_target=True).sum(1)
        torch.testing.assert_close(results[0]["divergence"], whole)


@pytest.mark.parametrize(("tail", "way"), [(True, "dense"), (False, "dense"), (False, "gathered")])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_dead_rows_and_unused_slots_may_hold_anything(poison: float, tail: bool, way: str, monkeypatch) -> None:
    go(way, monkeypatch)
    hidden, weight, rows = make(37, 11, 53, 7)
    dead = hidden.isnan().any(1)
    assert 5 < dead.sum() < 30
    backends = BACKENDS if way == "dense" else ["cpu"]
    for backend in backends:
        clean = ours(hidden.nan_to_num(0.0), weight, rows, tail=tail, backend=backend)
        dirty_rows = {name: value.clone() for name, value in rows.items()}
        dirty_hidden = hidden.clone()
        dirty_hidden[dead] = poison
        dirty_rows["teacher_logprobs"][dead] = poison
        dirty_rows["teacher_logprobs"][rows["teacher_ids"] < 0] = poison
        dirty_rows["row_weight"][(rows["teacher_ids"] < 0).all(1)] = poison
        dirty_rows["teacher_ids"][rows["row_weight"] == 0] = 10**9
        dirty = ours(dirty_hidden, weight, dirty_rows, tail=tail, backend=backend)
        for name, value in clean.items():
            assert bool(torch.isfinite(value).all()) and torch.equal(dirty[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [True, False])
def test_nan_in_a_live_row_is_not_hidden(tail: bool, backend: str) -> None:
    hidden, weight, rows, _ = all_alive(6, 4, 9, 3)
    hidden[2, 1] = torch.nan
    result = linear_distill(hidden, weight, **rows, tail=tail, backend=backend)
    assert bool(result.loss.isnan()) and result.divergence.isnan().tolist() == [False, False, True] + [False] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_row(tokens: int, backend: str) -> None:
    hidden, weight, rows, _ = all_alive(tokens, 4, 7, 2)
    rows["row_weight"].zero_()
    mine = ours(hidden, weight, rows, backend=backend)
    assert mine["weight"].shape == weight.shape and mine["hidden"].shape == hidden.shape
    for name, value in mine.items():
        assert not value.any(), name


@pytest.mark.parametrize("tail", [True, False])
def test_only_live_rows_enter_the_products(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    go("dense", monkeypatch)
    hidden, weight, rows = make(129, 33, 257, 7)
    seen = {"logits": 0, "add": 0}
    logits, add = head_chunks.ChunkBuffers.logits, head_chunks.GradientAccumulator.add

    def counting_logits(self, hidden: Tensor, *rest: Any) -> Tensor:
        seen["logits"] += hidden.shape[0]
        return logits(self, hidden, *rest)

    def counting_add(self, index: Tensor, *rest: Any) -> None:
        seen["add"] += index.numel()
        add(self, index, *rest)

    monkeypatch.setattr(head_chunks.ChunkBuffers, "logits", counting_logits)
    monkeypatch.setattr(head_chunks.GradientAccumulator, "add", counting_add)
    linear_distill(hidden.requires_grad_(), weight, **rows, tail=tail)
    live = int((~hidden.isnan().any(1)).sum())
    assert seen == {"logits": live, "add": live} and live < 129
    with torch.no_grad():
        linear_distill(hidden, weight, **rows, tail=tail)
    assert seen == {"logits": 2 * live, "add": live}


def test_without_tail_few_ids_need_no_product_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, rows, _ = all_alive(5, 4, 480, 10)
    monkeypatch.setattr(cpu, "_dense", None)
    linear_distill(hidden, weight, **rows, tail=False)
    with pytest.raises(TypeError):
        linear_distill(hidden, weight[:479], **rows, tail=False)


@pytest.mark.parametrize("tail", [True, False])
def test_real_vocabulary(tail: bool) -> None:
    hidden, weight, rows, _ = all_alive(4, 16, 151936, 64, torch.float32)
    assert_close(ours(hidden, weight, rows, tail=tail), exact(hidden, weight, double(rows), tail=tail), 4e-6)


def test_outputs_and_their_gradients() -> None:
    hidden, weight, rows = make(17, 5, 30, 4, torch.bfloat16)
    hidden.requires_grad_()
    result = linear_distill(hidden, weight, **rows)
    assert [value.requires_grad for value in result] == [True] + [False] * 4
    assert {value.dtype for value in result} == {torch.float32}
    result.loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    result.loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)
    assert weight.grad is None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("tail", "slots"), [(True, 16), (False, 16), (False, 90)])
def test_runs_repeat_bit_by_bit(tail: bool, slots: int) -> None:
    case = make(300, 32, 1001, slots, torch.float32)
    first, second = (ours(*case, tail=tail) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 40),
    share=st.floats(0, 1),
    scale=st.sampled_from([1e-3, 1.0, 8.0]),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([1e-4, 0.1, 0.5, 0.95]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    tail=st.booleans(),
)
def test_any_case(seed, tokens, width, vocabulary, share, scale, divergence, beta, temperature, tail) -> None:
    """The definition, no negative divergence, and nothing changes when slots are shuffled and unused ones added."""
    torch.manual_seed(seed)
    slots = max(1, round(share * vocabulary))
    hidden, weight, rows = make(tokens, width, vocabulary, slots)
    hidden = hidden * scale
    options = {"divergence": divergence, "beta": beta, "temperature": temperature, "tail": tail}
    mine = ours(hidden, weight, rows, **options)
    truth = exact(hidden, weight, rows, **options)
    for name, value in truth.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert bool((mine["divergence"] >= -1e-13).all())
    unused = vocabulary - slots
    order = torch.randperm(vocabulary)
    shuffled = {
        "teacher_ids": F.pad(rows["teacher_ids"], (0, unused), value=-1)[:, order],
        "teacher_logprobs": F.pad(rows["teacher_logprobs"], (0, unused), value=torch.inf)[:, order],
        "row_weight": rows["row_weight"],
    }
    again = ours(hidden, weight, shuffled, **options)
    for name, value in mine.items():
        torch.testing.assert_close(again[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_operator_contract() -> None:
    hidden, weight, rows, _ = all_alive(5, 4, 6, 3)
    for backend in (None, "reference"):
        for train in (False, True):
            leaves = hidden.detach().requires_grad_(train), weight.detach().requires_grad_(train)
            scalars = ("jsd", 0.3, 0.7, True, None, train, train, backend)
            torch.library.opcheck(torch.ops.r4b_kernels.linear_distill.default, (*leaves, *rows.values(), *scalars))


@pytest.mark.parametrize("tail", [True, False])
def test_compiles_without_graph_breaks(tail: bool) -> None:
    hidden, weight, rows = make(12, 8, 100, 2)
    compiled = torch.compile(
        lambda h, w: linear_distill(h, w, **rows, divergence="jsd", tail=tail)._asdict(),
        backend="aot_eager",
        fullgraph=True,
    )
    mine = with_gradients(compiled, hidden, weight)
    assert_close(mine, exact(hidden, weight, rows, divergence="jsd", tail=tail), 1e-12)


def test_a_second_derivative_is_refused() -> None:
    """Its gradient is a constant to autograd, so that a second derivative would be silently wrong."""
    hidden, weight, rows = make(12, 8, 100, 2)
    loss = linear_distill(hidden.requires_grad_(), weight, **rows).loss
    with pytest.raises(NotImplementedError, match="linear_distill has no second derivative.*create_graph"):
        torch.autograd.grad(loss.square(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_ids": torch.zeros(4, 2, dtype=torch.int32)}, "teacher_ids must be int64"),
        ({"teacher_ids": torch.zeros(4, dtype=torch.int64)}, "teacher_ids must be int64"),
        ({"teacher_ids": torch.zeros(3, 2, dtype=torch.int64)}, "teacher_ids must be int64 .* T=4"),
        ({"teacher_ids": torch.zeros(4, 0, dtype=torch.int64)}, "K=0"),
        ({"teacher_ids": torch.zeros(4, 6, dtype=torch.int64)}, "K=6 .* vocabulary has 5"),
        ({"teacher_ids": torch.tensor([[0, 1], [0, 1], [0, 5], [0, 1]])}, "teacher_ids .* row 2"),
        ({"teacher_ids": torch.tensor([[0, 1], [0, 1], [0, 1], [4, 4]])}, "twice in row 3"),
        ({"teacher_logprobs": torch.zeros(4, 3)}, "teacher_logprobs"),
        ({"teacher_logprobs": torch.zeros(4, 2, dtype=torch.int64)}, "teacher_logprobs"),
        ({"teacher_logprobs": torch.full((4, 2), -0.5)}, "teacher_logprobs .* row 0"),
        ({"teacher_logprobs": torch.tensor([[-1.0, -1], [-1, torch.nan], [-1, -1], [-1, -1]])}, "row 1"),
        ({"teacher_logprobs": torch.full((4, 2), -torch.inf), "tail": False}, "row 0"),
        ({"teacher_logprobs": torch.full((4, 2), -torch.inf), "divergence": "reverse_kl"}, "reverse_kl is infinite"),
        ({"row_weight": torch.zeros(3)}, "row_weight"),
        ({"row_weight": torch.zeros(4, dtype=torch.int64)}, "row_weight"),
        ({"hidden": torch.zeros(4)}, "hidden"),
        ({"hidden": torch.zeros(())}, "teacher_ids"),
        ({"weight": torch.zeros(5, 4)}, "weight"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, "weight is torch.float64"),
        ({"row_weight": torch.zeros(4, device="meta")}, "row_weight is on meta and hidden on cpu"),
        ({"divergence": "kl"}, "divergence='kl'"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"beta": torch.nan}, "beta=nan"),
        ({"temperature": 0.0}, "temperature"),
        ({"backend": "abacus"}, "backend"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_argument(change: dict, named: str, backend: str) -> None:
    good = {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(5, 3),
        "teacher_ids": torch.tensor([[0, 1], [2, 3], [4, 0], [-1, 2]]),
        "teacher_logprobs": torch.full((4, 2), -1.0),
        "row_weight": torch.ones(4),
        "backend": backend,
    }
    linear_distill(**good)
    with pytest.raises(ValueError, match=named):
        linear_distill(**(good | change))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_agrees_with_trl_gkd(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is an oracle, not a dependency")
    hidden, weight, rows, teacher = all_alive(15, 8, 40, 40)
    rows["row_weight"] = torch.ones(15, dtype=torch.float64)

    def theirs(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        loss = gkd.GKDTrainer.generalized_jsd_loss(
            (h @ w.T)[None], 0.7 * teacher[None], beta=beta, temperature=0.7, reduction="sum"
        )
        return {"loss": loss}

    mine = ours(hidden, weight, rows, divergence="jsd", beta=beta, temperature=0.7)
    assert_close(mine, with_gradients(theirs, hidden, weight), 2e-7)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_agrees_with_trl_on_topk(alpha: float, tail: bool) -> None:
    """Their ids are the student's best K; ours may be any."""
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils", reason="TRL is an oracle, not a dependency")
    hidden, weight, rows, teacher = all_alive(15, 8, 40, 6)
    rows["teacher_ids"] = (hidden @ weight.T).topk(6).indices
    rows["teacher_logprobs"] = teacher.gather(1, rows["teacher_ids"])

    def theirs(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        value = losses.compute_topk_self_distillation_loss(
            h @ w.T, teacher, distillation_topk=6, distillation_alpha=alpha, distillation_add_tail=tail
        )
        return {"loss": (rows["row_weight"] * value).sum(), "divergence": value}

    mine = ours(hidden, weight, rows, divergence="jsd", beta=alpha, tail=tail)
    assert_close(mine, with_gradients(theirs, hidden, weight), 2e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_agrees_with_liger(beta: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is an oracle, not a dependency")
    hidden, weight, rows, _ = all_alive(15, 8, 40, 40, torch.float32)
    teacher_hidden, teacher_weight = torch.randn(15, 6), torch.randn(40, 6)
    rows["teacher_logprobs"] = (teacher_hidden @ teacher_weight.T / 0.7).log_softmax(-1).gather(1, rows["teacher_ids"])
    rows["row_weight"] = torch.full((15,), 1 / 15)
    module = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=0.7, compiled=False, chunk_size=4
    )
    labels = torch.zeros(15, dtype=torch.int64)

    def theirs(h: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {"loss": module(h, w, teacher_hidden, teacher_weight, labels)}

    mine = ours(hidden, weight, rows, divergence="jsd", beta=beta, temperature=0.7)
    assert_close(mine, with_gradients(theirs, hidden, weight), 2e-5)


PARALLEL = [
    {"shape": (1, 3, 4, 2), "options": {}},
    {"shape": (13, 11, 54, 7), "options": {"divergence": "reverse_kl", "temperature": 0.7}},
    {"shape": (20, 16, 256, 30), "options": {"divergence": "jsd", "beta": 0.2}},
    {"shape": (9, 5, 6, 6), "options": {}},
    {"shape": (11, 5, 200, 4), "options": {"divergence": "jsd", "tail": False}},
    {"shape": (9, 5, 12, 4), "options": {"divergence": "reverse_kl", "tail": False}},
    {"shape": (9, 5, 12, 6), "options": {"divergence": "jsd"}, "first_shard": True},
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[list[dict]]]:
    """Every case goes through one launch of the ranks, where the Triton kernels are interpreted."""
    torch.manual_seed(0)
    backends = BACKENDS + (["triton"] if importlib.util.find_spec("triton") else [])
    cases = []
    for case in PARALLEL:
        hidden, weight, rows = make(*case["shape"])
        if case.get("first_shard"):
            listed = torch.arange(6).expand(9, 6)
            rows["teacher_ids"] = torch.where(rows["teacher_ids"] < 0, rows["teacher_ids"], listed)
            rows["teacher_ids"][0] = listed[0]
        cases.append(
            {"hidden": hidden, "weight": weight, "rows": rows, "options": case["options"], "backends": backends}
        )
    return cases, launch(2, cases, Path(tmp_path_factory.mktemp("linear_distill")))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("index", range(len(PARALLEL)))
def test_two_ranks_equal_one(index: int, backend: str, on_two_ranks) -> None:
    cases, results = on_two_ranks
    if backend not in cases[index]["backends"]:
        pytest.skip("triton is not installed")
    whole = run(cases[index], cases[index]["weight"], None, "reference")
    first, second = (rank[index][backend] for rank in results)
    for name, expected in whole.items():
        if name == "weight":
            mine = torch.cat([first[name], second[name]])
        else:
            mine = first[name]
            assert torch.equal(mine, second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
