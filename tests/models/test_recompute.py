"""Recomputed activations: the same loss and gradients bit for bit, less kept, and frozen parts break no chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class Kept:
    """Counts the bytes of all storages that a forward pass keeps for the backward, weights aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # so that no address is given away twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


@contextmanager
def counting(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    kept, pack = Kept(model), recompute._Scope.pack

    def counted(scope: recompute._Scope, tensor: Tensor) -> Any:
        packed = pack(scope, tensor)
        for part in [packed] if isinstance(packed, Tensor) else packed[0].inputs:
            kept.count(part)
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(recompute._Scope, "pack", counted)
        with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor):
            yield kept


def run(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch, frozen: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """(loss, gradients, bytes kept) of one batch."""
    model = build_model(FAMILIES[family], ParallelConfig(recompute=mode), seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(has_prefix(name, prefix) for prefix in frozen))
    batch = batch_of(family)
    with counting(model, monkeypatch) as kept:
        hidden = model(batch)
    loss, _, _ = sft_head(model, batch, hidden)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, kept.bytes


FROZEN = {
    "nothing": (),
    "all but the decoder": ("embedding", "vision", "projector", "image_newline"),
    "what feeds the tower": ("embedding", "vision.patch_embed", "vision.position"),
    "the decoder": ("decoder", "embedding"),
    "the tower's layers": ("vision.blocks", "vision.patch_embed", "vision.position"),
}


@pytest.mark.parametrize("frozen", list(FROZEN))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_recomputation_changes_no_bit(family: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, truth, _ = run(family, "none", monkeypatch, FROZEN[frozen])
    trained = {name for name, gradient in truth.items() if gradient is not None}
    assert trained == {name for name in truth if not any(has_prefix(name, prefix) for prefix in FROZEN[frozen])}
    for mode in ("selective", "full"):
        again, gradients, _ = run(family, mode, monkeypatch, FROZEN[frozen])
        assert torch.equal(again, loss)
        assert {name for name, gradient in gradients.items() if gradient is not None} == trained
        for name in trained:
            assert torch.equal(gradients[name], truth[name]), f"{mode}: {name}"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_less_is_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    none, selective, full = (run(family, mode, monkeypatch)[2] for mode in MODES)
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
