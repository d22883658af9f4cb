"""The policy loss against the fused head, TRL's GRPO loss, and sequence ratios spelled out; the weights of its rows."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import BpoConfig
from r4b_core.losses.heads import PolicyHead, row_logprobs, sft_head
from r4b_core.losses.policy import policy_loss, response_row_weights, sequence_log_ratio
from r4b_kernels import policy_loss_head
from tests.models.build import one_batch, random_prompt

LENGTHS = torch.tensor([5, 1, 9, 3])
BUDGET = 12


def rows(lengths: Tensor = LENGTHS, seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    """Log-probs of the policy (differentiable), the old policy and the reference, and advantages, per row."""
    generator = torch.Generator().manual_seed(seed)
    count = int(lengths.sum())

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    logprob = -noise(1.0).abs()
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return {
        "logprob": logprob.clone().requires_grad_(),
        "old": logprob + noise(spread),
        "ref": logprob + noise(0.5),
        "advantage": advantage.repeat_interleave(lengths),
        "sequence": torch.arange(len(lengths)).repeat_interleave(lengths),
    }


def padded(column: Tensor, lengths: Tensor = LENGTHS) -> Tensor:
    """[N, longest] from rows laid end to end, zeros behind each response."""
    return torch.nn.utils.rnn.pad_sequence(list(column.split(lengths.tolist())), batch_first=True)


def our_loss(x: dict[str, Tensor], config: BpoConfig, lengths: Tensor = LENGTHS) -> Tensor:
    weights = response_row_weights(
        lengths, config.mode_token_weight, torch.zeros_like(lengths), True, config.reduction, BUDGET
    )
    log_ratio = None
    if config.importance == "sequence":
        counted = torch.ones(len(x["old"]), dtype=torch.bool)
        log_ratio = sequence_log_ratio(x["logprob"], x["old"], x["sequence"], counted, len(lengths))
    terms = policy_loss(
        x["logprob"],
        x["old"],
        x["advantage"],
        weights.weight.double(),
        ref_logprob=x["ref"] if config.kl_coef else None,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        log_ratio=log_ratio,
    )
    return terms.loss / weights.share.double().sum()


def trl_loss(x: dict[str, Tensor], config: BpoConfig) -> Tensor:
    """TRL's own method on a stand-in of its trainer."""
    GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    loss_type = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}[config.reduction]
    mask = padded(torch.ones_like(x["old"]))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(x["logprob"]), torch.zeros_like(mask), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
            reduce=lambda value, reduction: value,
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=config.kl_coef,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        importance_sampling_level=config.importance,
        loss_type=loss_type,
        max_completion_length=BUDGET,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    return GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": ids[:, :0],
            "prompt_mask": ids[:, :0],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.stack([part[0] for part in x["advantage"].split(LENGTHS.tolist())]),
            "old_per_token_logps": padded(x["old"]),
            "ref_per_token_logps": padded(x["ref"]),
            "num_items_in_batch": mask.sum(),
        },
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", ["bpo", "grpo", "gspo", "dr_grpo", "dapo"])
def test_equals_trl(algorithm: str, kl_coef: float) -> None:
    config = BpoConfig(algorithm=algorithm, kl_coef=kl_coef)
    if algorithm == "gspo":
        config = config.model_copy(update={"clip_low": 0.1, "clip_high": 0.15})
    x = rows()
    ours, theirs = our_loss(x, config), trl_loss(x, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x["logprob"])[0],
        torch.autograd.grad(theirs, x["logprob"])[0],
        rtol=1e-6,
        atol=1e-8,
    )


def test_sequence_ratio_equals_a_loop() -> None:
    x = rows()
    counted = torch.ones(len(x["old"]), dtype=torch.bool)
    counted[[0, 6, 7]] = False
    got = sequence_log_ratio(x["logprob"], x["old"], x["sequence"], counted, 4)
    row = 0
    for length in LENGTHS.tolist():
        inside = [i for i in range(row, row + length) if counted[i]]
        mean = math.fsum(float(x["logprob"][i] - x["old"][i]) for i in inside) / len(inside)
        for i in range(row, row + length):
            assert got[i].item() == pytest.approx(mean, abs=1e-12)
        row += length
    grad = torch.autograd.grad(got[1], x["logprob"])[0]
    torch.testing.assert_close(grad[:5], torch.tensor([0, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64))
    assert (
        not grad[5:].any()
        and not torch.autograd.grad(
            sequence_log_ratio(x["logprob"], x["old"], x["sequence"], counted, 4)[6], x["logprob"]
        )[0][6]
    )


def test_sequence_ratio_of_responses_without_counted_rows_is_one() -> None:
    x = rows()
    got = sequence_log_ratio(x["logprob"], x["old"], x["sequence"], x["sequence"] != 2, 5)
    assert not got[x["sequence"] == 2].any() and got.isfinite().all()


def test_gspo_equals_verl() -> None:
    """verl's rule: each token carries the sequence's ratio by value and its own log-prob's gradient, clipped the same.

    With one weight for all tokens of a response that is the gradient of the sequence ratio itself.
    """
    config = BpoConfig(algorithm="gspo", clip_low=0.1, clip_high=0.15, kl_coef=0.0)
    x = rows()
    mask = padded(torch.ones_like(x["old"]))
    logprob, old, advantage = padded(x["logprob"]), padded(x["old"]), padded(x["advantage"])
    mean = ((logprob - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    ratio = (logprob - logprob.detach() + mean.detach()).clamp(max=10).exp()
    per_token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high))
    theirs = ((per_token * mask).sum(-1) / mask.sum(-1)).mean()
    ours = our_loss(x, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x["logprob"])[0] for loss in (ours, theirs)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_equals_the_fused_head(kl_coef: float) -> None:
    count, vocabulary, temperature = int(LENGTHS.sum()), 37, 0.8
    x = rows()
    hidden = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, vocabulary, (count,))
    logprob = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    old, ref = logprob.detach() + 0.3 * torch.randn(count), logprob.detach() + 0.3 * torch.randn(count)
    row_weight = torch.rand(count, dtype=torch.float64)
    row_weight[::4] = 0
    settings: dict[str, Any] = dict(clip_low=0.2, clip_high=0.28, kl_coef=kl_coef)
    settings["ref_logprob"] = ref if kl_coef else None
    spelled = policy_loss(logprob, old, x["advantage"], row_weight, **settings)
    fused = policy_loss_head(
        hidden, weight, target, old, x["advantage"], row_weight, temperature=temperature, **settings
    )
    torch.testing.assert_close(fused.loss, spelled.loss)
    # The fused head need not compute rows without weight.
    live = row_weight != 0
    for name in ("ratio", "kl"):
        torch.testing.assert_close(getattr(fused, name)[live], getattr(spelled, name)[live])
    assert torch.equal(fused.clipped[live], spelled.clipped[live]) and spelled.clipped[live].any()
    for a, b in zip(
        torch.autograd.grad(fused.loss, (hidden, weight)),
        torch.autograd.grad(spelled.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_dapo_clips_higher_above_than_below() -> None:
    config = BpoConfig(algorithm="dapo")
    ratio = torch.tensor([1.25, 1.30, 0.75, 0.75, 1.30, 0.85], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    logprob = ratio.log().requires_grad_()
    terms = policy_loss(
        logprob,
        torch.zeros(6, dtype=torch.float64),
        advantage,
        torch.ones(6, dtype=torch.float64),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    assert terms.clipped.tolist() == [False, True, False, True, False, False]
    (grad,) = torch.autograd.grad(terms.loss, logprob)
    want = torch.where(terms.clipped, 0.0, -ratio * advantage)
    torch.testing.assert_close(grad, want)


def test_kl_is_the_k3_estimate() -> None:
    logprob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.5, -2.5], dtype=torch.float64)
    terms = policy_loss(
        logprob, logprob.detach(), torch.zeros(3), torch.ones(3, dtype=torch.float64), ref_logprob=ref, kl_coef=0.5
    )
    want = [math.exp(r - p) - (r - p) - 1 for p, r in zip(logprob.tolist(), ref.tolist(), strict=True)]
    assert terms.kl.tolist() == pytest.approx(want)
    assert terms.loss.item() == pytest.approx(0.5 * sum(want))
    (grad,) = torch.autograd.grad(terms.loss, logprob)
    assert grad.tolist() == pytest.approx([0.5 * (1 - math.exp(d)) for d in (0.0, 0.5, -2.0)])


def test_broken_logprobs_in_rows_without_weight_do_no_harm() -> None:
    logprob = torch.tensor([-1.0, -math.inf, -2.0], requires_grad=True)
    terms = policy_loss(logprob, torch.tensor([-1.0, 0.0, -2.0]), torch.ones(3), torch.tensor([1.0, 0.0, 1.0]))
    terms.loss.backward()
    assert terms.loss.item() == -2.0
    assert logprob.grad is not None and logprob.grad.tolist() == [-1.0, 0.0, -1.0]


def test_row_weights_of_each_reduction() -> None:
    lengths, forced = torch.tensor([4, 1, 2]), torch.tensor([1, 0, 2])

    def of(reduction: str, decision: float = 1.0, include: bool = True) -> tuple[list[float], float]:
        made = response_row_weights(lengths, decision, forced, include, reduction, 10)
        return made.weight.tolist(), pytest.approx(made.share.sum().item())

    assert of("token_mean") == ([1.0] * 7, 7)
    assert of("sequence_mean") == (pytest.approx([0.25] * 4 + [1.0] + [0.5] * 2), 3)
    assert of("constant") == (pytest.approx([0.1] * 7), 3)
    # The emphasis on the decision is not divided out again.
    assert of("token_mean", decision=3.0) == ([3.0, 1.0, 1.0, 1.0, 3.0, 3.0, 1.0], 7)
    assert of("sequence_mean", decision=3.0) == (pytest.approx([0.75] + [0.25] * 3 + [3.0, 1.5, 0.5]), 3)
    # Excluded forced tokens count nowhere; a response of forced tokens alone drops out.
    assert of("token_mean", include=False) == ([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], 4)
    assert of("sequence_mean", include=False) == (pytest.approx([0.0] + [1 / 3] * 3 + [1.0, 0.0, 0.0]), 2)
    with pytest.raises(ValueError, match="reduction='mean'.*token_mean, sequence_mean and constant"):
        of("mean")


def test_row_weights_do_not_depend_on_the_other_responses() -> None:
    lengths, forced = torch.tensor([4, 1, 2]), torch.tensor([1, 0, 2])
    for reduction in ("token_mean", "sequence_mean", "constant"):
        together = response_row_weights(lengths, 2.0, forced, False, reduction, 10)
        apart = [
            response_row_weights(lengths[i : i + 1], 2.0, forced[i : i + 1], False, reduction, 10) for i in range(3)
        ]
        assert torch.equal(together.weight, torch.cat([x.weight for x in apart]))
        assert torch.equal(together.share, torch.cat([x.share for x in apart]))


class Head:
    """What a loss head asks of a model: the output weights."""

    cp_group = None

    def __init__(self, vocabulary: int, width: int) -> None:
        self.weight = torch.randn(vocabulary, width, requires_grad=True)

    def head_weight(self) -> Tensor:
        return self.weight

    def head_group(self) -> None:
        return None


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("mode_token_loss", ["include", "exclude"])
def test_excluded_forced_tokens_get_no_gradient(importance: str, mode_token_loss: str) -> None:
    config = BpoConfig(importance=importance, mode_token_loss=mode_token_loss, kl_coef=0.1, mode_token_weight=2.0)
    length, forced = 6, 2
    weights = response_row_weights(
        torch.tensor([length]),
        config.mode_token_weight,
        torch.tensor([forced]),
        mode_token_loss == "include",
        config.reduction,
        BUDGET,
    )
    batch = one_batch(random_prompt(torch.Generator(), 3), list(range(length)), old_logprob=-3.0, advantage=1.0)
    batch.row_weight = weights.weight
    batch.row_data |= {"ref_logprob": torch.full((length,), -2.5), "share": weights.share}
    model: Any = Head(64, 16)
    hidden = torch.randn(length, 16, requires_grad=True)
    loss, denominator, metrics = PolicyHead(config)(model, batch, hidden)
    (grad,) = torch.autograd.grad(loss, hidden)
    reached = grad.abs().sum(-1) > 0
    # Where the ratio is clipped the KL still reaches a row.
    assert reached.tolist() == [mode_token_loss == "include"] * forced + [True] * (length - forced)
    assert denominator == metrics["rows"] == (length if mode_token_loss == "include" else length - forced)


def test_sft_head_is_the_mean_negative_log_likelihood() -> None:
    batch = one_batch(random_prompt(torch.Generator(), 3), [5, 6, 7, 8])
    batch.row_weight = torch.tensor([1.0, 0.0, 1.0, 2.0])
    model: Any = Head(64, 16)
    hidden = torch.randn(4, 16)
    loss, denominator, metrics = sft_head(model, batch, hidden)
    logprob = (hidden @ model.weight.T).log_softmax(-1)
    picked = logprob.gather(1, batch.row_target[:, None]).squeeze(1)
    torch.testing.assert_close(loss, -(batch.row_weight * picked).sum())
    assert denominator == metrics["rows"] == 3
    entropy = -(logprob.exp() * logprob).sum(-1)
    torch.testing.assert_close(metrics["entropy"], entropy[[0, 2, 3]].sum())
    torch.testing.assert_close(row_logprobs(model, batch, hidden, 1.0), picked)
