"""Recomputed activations: the same loss and gradients bit for bit, less kept, and frozen parts break no chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import sft_head
from r4b_core.models import recompute
from r4b_core.models.families import build_model, resolve
from r4b_core.parallel.names import has_prefix
from tests.models import build, qwen3_vl_oracle
from tests.models.kept import kept_bytes

FAMILIES = {
    "r4b": ModelConfig(family="r4b", shape={**build.SMALL, "vision_num_layers": 3}),
    "qwen3_vl": ModelConfig(family="qwen3_vl", shape=qwen3_vl_oracle.SMALL),
}
MODES = ("none", "selective", "full")


def batch_of(family: str) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    if family == "r4b":
        prompt: Any = build.random_prompt(generator, 5, [(3, 4), (2, 3)], 2)
    else:
        prompt = qwen3_vl_oracle.random_prompt(generator, resolve(FAMILIES[family]), 5, [(4, 6), (2, 2)], 2)
    responses = [Response(torch.randint(0, 62, (length,), generator=generator).tolist()) for length in (5, 3)]
    ((batch,),) = pack_groups_for_rl([prompt], [responses], 256)
    return batch


def run(
    family: str, mode: str, frozen: Sequence[str] = (), dtype: str = "float32"
) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """(loss, gradients, bytes kept) of one batch."""
    config = FAMILIES[family].model_copy(update={"dtype": dtype})
    model = build_model(config, ParallelConfig(recompute=mode), seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(has_prefix(name, prefix) for prefix in frozen))
    batch = batch_of(family)
    hidden, kept = kept_bytes(model, batch)
    loss, _, _ = sft_head(model, batch, hidden)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, kept


FROZEN = {
    "nothing": (),
    "all but the decoder": ("embedding", "vision", "projector", "image_newline"),
    "what feeds the tower": ("embedding", "vision.patch_embed", "vision.position"),
    "the decoder": ("decoder", "embedding"),
    "the tower's layers": ("vision.blocks", "vision.patch_embed", "vision.position"),
}


@pytest.mark.parametrize("frozen", list(FROZEN))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_recomputation_changes_no_bit(family: str, frozen: str) -> None:
    loss, truth, _ = run(family, "none", FROZEN[frozen])
    trained = {name for name, gradient in truth.items() if gradient is not None}
    assert trained == {name for name in truth if not any(has_prefix(name, prefix) for prefix in FROZEN[frozen])}
    for mode in ("selective", "full"):
        again, gradients, _ = run(family, mode, FROZEN[frozen])
        assert torch.equal(again, loss)
        assert {name for name, gradient in gradients.items() if gradient is not None} == trained
        for name in trained:
            assert torch.equal(gradients[name], truth[name]), f"{mode}: {name}"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_in_bfloat16_too(family: str) -> None:
    results = {mode: run(family, mode, dtype="bfloat16") for mode in MODES}
    loss, truth, _ = results["none"]
    for mode in ("selective", "full"):
        again, gradients, _ = results[mode]
        assert torch.equal(again, loss) and all(torch.equal(gradients[name], truth[name]) for name in truth)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_less_is_kept(family: str) -> None:
    none, selective, full = (run(family, mode)[2] for mode in MODES)
    print(f"{family}: {none} bytes kept, {selective / none:.2f} of them selectively, {full / none:.2f} fully")
    assert full < 0.6 * selective and selective < 0.8 * none


def test_outside_of_a_training_step_nothing_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_checkpoint(*_: Any) -> None:
        raise AssertionError("recomputation outside of a training step")

    monkeypatch.setattr(recompute.tensor_parallel, "checkpoint", no_checkpoint)
    monkeypatch.setattr(recompute._Scope, "remember", no_checkpoint)
    batch = batch_of("qwen3_vl")
    for mode in ("selective", "full"):
        model = build_model(FAMILIES["qwen3_vl"], ParallelConfig(recompute=mode), seed=1)
        model.eval()(batch)


def test_outputs_of_a_repeated_call_live_until_each_was_asked_for() -> None:
    calls = []

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return x + 1, x * 2

    x = torch.ones(3, requires_grad=True)
    with recompute.recomputing():
        one, two = recompute.again(both, x)
        product = (one * two).sum()
    assert len(calls) == 1
    product.backward()
    assert len(calls) == 2 and torch.equal(x.grad, torch.full((3,), 2.0 + 4.0))


def test_a_view_of_an_output_comes_back_as_that_view() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def squares(recomputed: bool) -> Tensor:
        y = recompute.again(torch.sin, x)
        return (y.view(6, 4)[1:, 2:].t() ** 2).sum()

    with recompute.recomputing():
        loss = squares(True)
    (mine,) = torch.autograd.grad(loss, x)
    (truth,) = torch.autograd.grad(squares(False), x)
    assert torch.equal(mine, truth)
