"""What verl's loop would call, against verl's own functions: advantages, losses, aggregation and the fused head."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from r4b_kernels import policy_loss_head
from r4b_kernels.adapters import verl as adapter

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is an oracle, not a dependency", allow_module_level=True)

from tests.kernels.adapters import verl_oracle as verl

core = verl.core_algos
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    adapter.register()
    adapter.register()


def responses(count: int = 24, length: int = 6) -> tuple[Tensor, Tensor, Any]:
    """Rewards on the last token [B, C], mask [B, C] and prompts' uids in no order, one prompt with one response."""
    lengths = torch.randint(1, length + 1, (count,))
    mask = (torch.arange(length) < lengths[:, None]).float()
    rewards = torch.zeros(count, length)
    rewards[torch.arange(count), lengths - 1] = torch.randint(0, 3, (count,)).float()
    uid = np.array([f"prompt-{i % 5}" for i in range(count - 1)] + ["alone"], dtype=object)
    order = torch.randperm(count)
    return rewards[order], mask[order], uid[order.numpy()]


def settings(**changes: Any) -> Any:
    return verl.AlgoConfig(**changes)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
def test_union_is_grpo_over_both_modes(name: str, std: bool) -> None:
    rewards, mask, uid = responses()
    mine, returns = core.get_adv_estimator_fn("r4b_bimode")(
        token_level_rewards=rewards, response_mask=mask, index=uid, config=settings(norm_adv_by_std_in_grpo=std)
    )
    theirs, _ = core.get_adv_estimator_fn(name)(rewards.clone(), mask, uid, norm_adv_by_std_in_grpo=std)
    shared = torch.from_numpy(uid != "alone")
    torch.testing.assert_close(mine[shared], theirs[shared], rtol=2e-5, atol=2e-6)
    assert torch.equal(mine, returns) and bool(mine.any()) and not mine[~shared].any()


@pytest.mark.parametrize("name", ["rloo", "rloo_vectorized"])
def test_leave_one_out_is_rloo(name: str) -> None:
    rewards, mask, uid = responses()
    mine, _ = core.get_adv_estimator_fn("r4b_bimode_loo")(
        token_level_rewards=rewards, response_mask=mask, index=uid, config=settings(norm_adv_by_std_in_grpo=False)
    )
    theirs, _ = core.get_adv_estimator_fn(name)(rewards.clone(), mask, uid)
    shared = torch.from_numpy(uid != "alone")
    torch.testing.assert_close(mine[shared], theirs[shared], rtol=2e-5, atol=2e-6)


def test_per_mode_is_grpo_with_a_prompt_for_each_mode() -> None:
    rewards, mask, uid = responses()
    mode = torch.randint(0, 2, (len(uid),))
    mine, _ = adapter.bimode_advantage(rewards, mask, uid, mode=mode, baseline="per_mode")
    split = np.array([f"{prompt}/{m}" for prompt, m in zip(uid, mode.tolist(), strict=True)], dtype=object)
    theirs, _ = core.compute_grpo_outcome_advantage(rewards.clone(), mask, split)
    several = torch.tensor([list(split).count(key) > 1 for key in split])
    torch.testing.assert_close(mine[several], theirs[several], rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match="needs mode"):
        adapter.bimode_advantage(rewards, mask, uid, baseline="per_mode")


def masks() -> Tensor:
    return (torch.arange(7) < torch.tensor([7, 0, 3, 1])[:, None]).float()


GLOBAL: list[dict[str, Any]] = [
    {},
    {"dp_size": 4, "batch_num_tokens": 90, "global_batch_size": 16},
    {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 8, "loss_scale_factor": 32},
]


@pytest.mark.parametrize("info", GLOBAL)
@pytest.mark.parametrize("mode", MODES)
def test_row_weights_are_agg_loss(mode: str, info: dict[str, Any]) -> None:
    losses, mask = torch.randn(4, 7), masks()
    theirs = core.agg_loss(losses, mask, mode, **info)
    torch.testing.assert_close((losses * adapter.row_weights(mask, mode, **info)).sum(), theirs)
    with pytest.raises(ValueError, match="loss_agg_mode='mean'"):
        adapter.row_weights(mask, "mean")


def actor(mode: str, **changes: Any) -> Any:
    fixed = dict(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode)
    return verl.ActorConfig(**fixed, clip_ratio_low=0.15, clip_ratio_high=0.3, **changes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_clip_loss_is_vanilla_without_the_dual_clip(mode: str, weighted: bool) -> None:
    mask, advantages, old = masks(), torch.randn(4, 7), torch.randn(4, 7)
    log_prob = (old + 0.4 * torch.randn(4, 7)).requires_grad_()
    importance = torch.rand(4, 7) if weighted else None
    config = actor(mode, clip_ratio_c=1e9)  # out of reach
    results = []
    for name in ("r4b_clip", "vanilla"):
        loss, metrics = core.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=importance,
        )
        results.append((loss, torch.autograd.grad(loss, log_prob)[0], metrics))
    (mine, my_gradient, my_metrics), (theirs, gradient, metrics) = results
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(my_gradient, gradient, rtol=1e-6, atol=1e-8)
    for name, value in my_metrics.items():
        assert value == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


def test_masked_tokens_may_hold_anything() -> None:
    mask, bad = masks(), torch.full((4, 7), torch.nan)
    old, advantages = (torch.where(mask.bool(), torch.randn(4, 7), bad) for _ in range(2))
    log_prob = torch.where(mask.bool(), torch.randn(4, 7), bad).requires_grad_()
    loss, metrics = adapter.clip_policy_loss(
        old, log_prob, advantages, mask, "token-mean", actor("token-mean"), torch.where(mask.bool(), mask, bad)
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and not gradient[mask == 0].any()
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_head_with_row_weights_is_verl_on_logits(mode: str) -> None:
    """Head, clipped loss and k3 in one op against verl's three functions on materialized logits."""
    mask, advantages, target = masks(), torch.randn(4, 7), torch.randint(43, (4, 7))
    hidden, weight = torch.randn(4, 7, 12, requires_grad=True), torch.randn(43, 12, requires_grad=True)
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    old, ref = (logprob.detach() + 0.4 * torch.randn(4, 7) for _ in range(2))
    config = actor(mode, clip_ratio_c=1e9)
    policy, _ = core.compute_policy_loss_vanilla(old, logprob, advantages, mask, mode, config)
    theirs = policy + 0.05 * core.agg_loss(core.kl_penalty(logprob, ref, "k3"), mask, mode)
    expected = torch.autograd.grad(theirs, (hidden, weight))
    rows = (old.flatten(), advantages.flatten(), adapter.row_weights(mask, mode).flatten())
    mine = policy_loss_head(
        hidden.flatten(0, 1),
        weight,
        target.flatten(),
        *rows,
        ref_logprob=ref.flatten(),
        clip_low=0.15,
        clip_high=0.3,
        kl_coef=0.05,
    ).loss
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)
    for got, wanted in zip(torch.autograd.grad(mine, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(verl's own fused head, the class under the adapter)"""
    fused = verl.fused_linear.FusedLinearForPPO
    original = fused.forward
    monkeypatch.setattr(fused, "forward", original)  # undone at the end
    adapter.use_linear_logprob()
    assert fused.forward is not original
    return lambda *inputs: original(fused(), *inputs), fused()


@pytest.mark.parametrize("shape", [(11,), (3, 5)])
def test_fused_head(head: Any, shape: tuple[int, ...]) -> None:
    theirs, mine = head
    hidden, weight = torch.randn(*shape, 12, requires_grad=True), torch.randn(43, 12, requires_grad=True)
    target = torch.randint(43, shape)
    seeds = [torch.randn(shape) for _ in range(2)]
    results = []
    for function in (mine, theirs):
        values = function(hidden, weight, target, 0.7)
        assert [value.shape for value in values] == [shape, shape]
        results.append((*values, *torch.autograd.grad(values, (hidden, weight), seeds)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-6)


def test_fused_head_in_verls_forward(head: Any) -> None:
    """verl's patched forward of a Hugging Face model gives the log-probabilities of its logits."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    config = transformers.Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model, ids = transformers.Qwen3ForCausalLM(config), torch.randint(43, (2, 9))
    out = verl.dense_common.forward_with_torch_backend(model, input_ids=ids, temperature=0.7, return_dict=True)
    expected = (model(ids).logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(
        out.log_probs[:, :-1], expected[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(out.entropy, -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)
