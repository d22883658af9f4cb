from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from r4b_core.parallel.names import has_prefix
from r4b_core.parallel.optimizer import GroupStepAdamW, learning_rate, lr_multiplier
from r4b_core.parallel.runtime import Runtime
from tests.parallel.harness import Layout, Optim
from tests.parallel.toy import toy_batches, toy_loss


def test_adamw_equals_torch() -> None:
    torch.manual_seed(0)
    start = [torch.randn(33), torch.randn(8, 5)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine, torchs = GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert mine.param_groups[0]["step"] == 5
    assert all("step" not in state for state in mine.state.values())


def test_adamw_repeats_bit_for_bit_and_survives_its_state_dict() -> None:
    def run(split: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        parameter = torch.nn.Parameter(torch.randn(1000, generator=generator))
        optimizer = GroupStepAdamW([parameter], lr=1e-2)
        for step in range(4):
            if split and step == 2:
                state = optimizer.state_dict()
                optimizer = GroupStepAdamW([parameter], lr=1e-2)
                optimizer.load_state_dict(state)
            parameter.grad = torch.randn(1000, generator=generator)
            optimizer.step()
        return parameter.detach()

    assert torch.equal(run(False), run(True))


def test_schedules() -> None:
    cosine = Optim(lr=1.0, warmup_steps=4, min_lr_ratio=0.1, schedule="cosine")
    rates = [learning_rate(step, cosine, 20) for step in range(22)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later <= earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[19] == rates[21] == pytest.approx(0.1)
    linear = Optim(lr=2.0, warmup_steps=0, min_lr_ratio=0.0, schedule="linear")
    assert [learning_rate(step, linear, 5) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    constant = Optim(lr=3.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(step, constant, 5) for step in range(9)} == {3.0}
    with pytest.raises(ValueError, match="choose constant, cosine or linear"):
        learning_rate(5, Optim(schedule="cosin"), 10)


def test_prefixes_end_at_dots_and_the_longest_wins() -> None:
    assert all(has_prefix(name, "vision") for name in ("vision.blocks.0", "vision"))
    assert has_prefix("vision.x", "vision.")
    assert not has_prefix("visionary.x", "vision")
    scale = {"vision": 0.1, "vision.merger": 1.0, "head": 0.0}
    assert lr_multiplier("vision.blocks.0.weight", scale) == 0.1
    assert lr_multiplier("vision.merger.weight", scale) == 1.0
    assert lr_multiplier("head.weight", scale) == 0.0
    assert lr_multiplier("decoder.weight", scale) == 1.0


@pytest.mark.parametrize(
    "runtime", [Layout(), Layout(distributed_optimizer=False)], indirect=True, ids=["distributed", "whole"]
)
def test_groups_have_their_rates_and_decay(make_learner: Callable, runtime: Runtime) -> None:
    learner = make_learner(Optim(lr=1.0, warmup_steps=0, schedule="constant", lr_scale={"vision": 0.1}))
    result = learner.step(toy_batches(1), toy_loss)
    assert result.lr == 1.0
    counts = {
        (group["lr"], group["weight_decay"]): sum(p.numel() for p in group["params"])
        for group in learner.optimizer.param_groups
    }
    named = dict(learner.model.named_parameters())
    assert counts[0.1, 0.01] == named["vision.weight"].numel()
    assert counts[0.1, 0.0] == named["vision.bias"].numel()
    norms = sum(p.numel() for name, p in named.items() if p.dim() == 1 and not name.startswith("vision"))
    assert counts[1.0, 0.0] == norms
    assert sum(counts.values()) == sum(p.numel() for p in named.values())


def test_a_multiplier_of_zero_freezes(make_learner: Callable) -> None:
    learner = make_learner(Optim(lr_scale={"vision": 0.0}))
    before = learner.model.vision.weight.clone()
    learner.step(toy_batches(1), toy_loss)
    assert torch.equal(before, learner.model.vision.weight)
    assert not learner.model.vision.weight.requires_grad


@pytest.mark.parametrize(
    "scale,words", [({"visoin": 0.1}, "optim.lr_scale names 'visoin'.*vision"), ({"vision": -1.0}, "must|finite and 0")]
)
def test_a_bad_multiplier_is_named(make_learner: Callable, scale: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_learner(Optim(lr_scale=scale))
