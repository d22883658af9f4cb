"""Mixes of layouts, recomputation, frozen parts and their learning rates, for both families, on two and four ranks.

Gradients are compared with one rank's; what the optimizer makes of them with torch's AdamW. Batches are packed with and
without shared prompts, and some data-parallel ranks have no image. Nothing here covers NCCL, streams or bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from r4b_core.config.recipe import BpoConfig, ModelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.losses.heads import PolicyHead, row_logprobs, sft_head
from r4b_core.models.families import build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.names import global_names, has_prefix
from r4b_core.parallel.optimizer import constant_rate, learning_rate
from r4b_core.parallel.runtime import start
from tests.parallel import ranks_model, ranks_qwen3_vl
from tests.parallel.harness import Layout, Optim, build_chunks, compare_layouts, parameters_by_name, relative_error

TWO_RANKS = {
    "pp2_v2": Layout(pp=2, virtual_stages=2),
    "pp2_v2_full": Layout(pp=2, virtual_stages=2, recompute="full"),
    "dp2_full": Layout(recompute="full"),
    "tp2_sp_selective": Layout(tp=2, sequence_parallel=True, recompute="selective"),
    "cp2_selective": Layout(cp=2, recompute="selective"),
}
FOUR_RANKS = {
    "tp2_pp2_v2": Layout(tp=2, pp=2, virtual_stages=2),
    "tp2_sp_pp2_v2_selective": Layout(tp=2, pp=2, sequence_parallel=True, virtual_stages=2, recompute="selective"),
    "tp2_sp_cp2_full": Layout(tp=2, cp=2, sequence_parallel=True, recompute="full"),
    "pp2_v2_cp2": Layout(pp=2, cp=2, virtual_stages=2),
    "pp2_v2_dp2": Layout(pp=2, virtual_stages=2),
    "pp2_dp2_full": Layout(pp=2, recompute="full"),
    "cp2_dp2_selective": Layout(cp=2, recompute="selective"),
    "tp2_dp2_full": Layout(tp=2, recompute="full"),
    # DeepStack's two layers must lie in the first of eight chunks: R-4B's alone.
    "pp4_v2": Layout(pp=4, virtual_stages=2),
}
# Where gradients are reduced while the backward pass still runs.
OVERLAPPED = ("dp2_full", "pp2_v2_dp2", "cp2_dp2_selective")
IS_FOUR = os.environ.get("WORLD_SIZE") == "4"
LAYOUTS = FOUR_RANKS if IS_FOUR else TWO_RANKS
# On two ranks a part of them for each case, since these run with every test.
PARTS = {
    ("r4b", False): ["pp2_v2", "cp2_selective"],
    ("r4b", True): ["pp2_v2_full", "dp2_full"],
    ("qwen3_vl", False): ["pp2_v2", "dp2_full", "cp2_selective"],
    ("qwen3_vl", True): ["pp2_v2_full", "tp2_sp_selective"],
}


@dataclass(frozen=True)
class Family:
    """A model, its batches by whether prompts are shared, and parts with rates of their own."""

    model: ModelConfig
    batches: Callable[[bool], list[PackedBatch]]
    lr_scale: dict[str, float]
    constant: list[str] = field(default_factory=list)

    @property
    def build(self) -> Callable[..., torch.nn.Module]:
        def stage(layout: Any, chunk: int = 0) -> torch.nn.Module:
            return build_model(self.model, layout, seed=3, chunk=chunk)

        return stage


FAMILIES = {
    "r4b": Family(
        ranks_model.MODEL.model_copy(update={"shape": {**ranks_model.MODEL.shape, "num_layers": 8 if IS_FOUR else 4}}),
        lambda share: ranks_model.bpo_batches() if share else ranks_model.sft_batches(),
        {"vision": 0.0, "projector": 0.1, "image_newline": 0.1, "decoder.layers.2": 0.0, "embedding": 0.5},
        ["projector", "image_newline"],
    ),
    "qwen3_vl": Family(
        # Two chunks on each of two ranks, and DeepStack adds to two layers.
        ModelConfig(family="qwen3_vl", shape={**ranks_qwen3_vl.SHAPE, "num_layers": 8}),
        ranks_qwen3_vl.batches,
        {"vision": 0.2, "vision.blocks": 0.0, "vision.deepstack.1": 1.0, "decoder": 0.0, "decoder.layers.5": 0.3},
        ["vision"],
    ),
}
HEADS = {False: sft_head, True: PolicyHead(BpoConfig(kl_coef=0, clip_low=0.3, clip_high=0.4))}


def layouts_of(name: str) -> list[str]:
    return [key for key in LAYOUTS if name == "r4b" or key != "pp4_v2"]


@pytest.mark.parametrize("share_prefix", [False, True], ids=["sft", "bpo"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradients_are_those_of_one_rank(name: str, share_prefix: bool) -> None:
    """Two micro-batches leave a data-parallel rank without an image; three leave a place in a pipeline's round."""
    family = FAMILIES[name]
    count = 3 if share_prefix else 4 if IS_FOUR else 2
    batches = family.batches(share_prefix)[:count]
    layouts = {key: LAYOUTS[key] for key in (layouts_of(name) if IS_FOUR else PARTS[name, share_prefix])}
    print(compare_layouts(family.build, batches, HEADS[share_prefix], layouts, fill=ranks_model.keep_initial))


def test_micro_batches_of_one_length_need_not_tell_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_shapes(*_: Any) -> None:
        raise AssertionError("shapes are told though all are equal")

    monkeypatch.setattr(P2PCommunicator, "_communicate_shapes", no_shapes)
    family = FAMILIES["r4b"]
    batches = [family.batches(False)[0]] * 2
    names = ["tp2_sp_pp2_v2_selective", "pp2_v2_cp2"] if IS_FOUR else ["pp2_v2"]
    layouts = {name: LAYOUTS[name] for name in names} | ({} if IS_FOUR else {"pp2": Layout(pp=2)})
    compare_layouts(family.build, batches, sft_head, layouts, fill=ranks_model.keep_initial)


def rates(family: Family) -> Optim:
    # A large epsilon keeps Adam from magnifying the rounding of gradients near zero.
    return Optim(lr=1e-2, eps=1e-4, lr_scale=family.lr_scale, constant=family.constant)


def torchs(family: Family, batches: Sequence[PackedBatch], optim: Optim, steps: int) -> dict[str, Tensor]:
    """Parameters after some steps of torch's AdamW on one rank, one parameter group for each rate."""
    model = family.build(Layout())
    names = global_names(model)
    groups = []
    for name, parameter in model.named_parameters():
        known = names[name]
        (scale, *_) = [
            *(optim.lr_scale[prefix] for prefix in sorted(optim.lr_scale, key=len)[::-1] if has_prefix(known, prefix)),
            1.0,
        ]
        rate = constant_rate if any(has_prefix(known, prefix) for prefix in optim.constant) else None
        decay = 0.0 if parameter.dim() == 1 else optim.weight_decay
        parameter.requires_grad_(scale > 0)
        groups.append(dict(params=[parameter], scale=scale, rate=rate, weight_decay=decay))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    for step in range(steps):
        adam.zero_grad()
        outputs = [sft_head(model, batch, model(batch)) for batch in batches]
        (sum(loss for loss, _, _ in outputs) / sum(weight for _, weight, _ in outputs)).backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip_grad)
        for group in adam.param_groups:
            rate = group["rate"](step, optim) if group["rate"] else learning_rate(step, optim, 10)
            group["lr"] = rate * group["scale"]
        adam.step()
    return parameters_by_name(model)


def train(learner: Learner, batches: Sequence[PackedBatch], steps: int) -> list[float]:
    place = learner.runtime
    return [learner.step(batches[place.dp_rank :: place.dp], sft_head).loss for _ in range(steps)]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_frozen_parts_stay_and_others_move_at_their_own_rate(name: str) -> None:
    family = FAMILIES[name]
    batches, optim = family.batches(False)[:4], rates(family)
    runtime = start(Layout(), seed=1)
    before = parameters_by_name(family.build(Layout()))
    truth = torchs(family, batches, optim, 4)
    runtime.stop()
    still = {key for key, value in before.items() if torch.equal(value, truth[key])}
    assert still and any(key.startswith("vision.") for key in still)
    for key in layouts_of(name) if IS_FOUR else ["pp2_v2", "dp2_full"]:
        layout = LAYOUTS[key]
        runtime = start(layout, seed=1)
        try:
            chunks, overlap = build_chunks(family.build, layout), key in OVERLAPPED
            learner = Learner(chunks, runtime, optim, total_steps=10, overlap_grad_reduce=overlap)
            train(learner, batches, 4)
            after = parameters_by_name(learner.models)
        finally:
            runtime.stop()
        assert {key for key, value in before.items() if torch.equal(value, after[key])} == still
        worst = max(relative_error(after[key] - before[key], truth[key] - before[key]) for key in before.keys() - still)
        assert worst < 1e-3, f"{layout}: moved otherwise by {worst:.1e}"


CHAIN = (
    ["pp2_v2_dp2", "tp2_pp2_v2", "pp2_dp2_full", "cp2_dp2_selective"] if IS_FOUR else ["pp2_v2", "dp2_full", "pp2_v2"]
)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_checkpoint_goes_from_layout_to_layout(name: str) -> None:
    """Each layout saves what the next one continues, every second one with the distributed optimizer."""
    family = FAMILIES[name]
    batches, folder = family.batches(False)[:4], Path(os.environ["R4B_TEST_SHARED"]) / f"{name}_{IS_FOUR}"
    path, expected = None, None
    for number, key in enumerate(CHAIN):
        layout = replace(LAYOUTS[key], distributed_optimizer=number % 2 == 0)
        runtime = start(layout, seed=1)
        try:
            learner = Learner(build_chunks(family.build, layout), runtime, rates(family), total_steps=10)
            if path is None:
                train(learner, batches, 2)
            else:
                checkpoint.load(path, learner)
            path = checkpoint.save(folder / str(number), number, learner, {})
            losses = train(learner, batches, 2)
            assert expected is None or losses == pytest.approx(expected, rel=1e-6)
            expected = losses
        finally:
            runtime.stop()


@pytest.mark.skipif(IS_FOUR, reason="a pipeline of two ranks says it all")
def test_forward_passes_come_back_in_order_without_what_filled_the_round() -> None:
    family, layout = FAMILIES["r4b"], Layout(pp=2, virtual_stages=2)
    batches = family.batches(True)[:3]
    found = {}
    for key, place in {"one": Layout(), "many": layout}.items():
        runtime = start(place, seed=1)
        try:
            learner = Learner(build_chunks(family.build, place), runtime, Optim(), total_steps=10)
            rows = partial(row_logprobs, temperature=1.0)
            found[key] = learner.forward_only(batches, rows, model=learner.models, broadcast=True)
        finally:
            runtime.stop()
    assert len(found["many"]) == 3
    for one, many in zip(found["one"], found["many"], strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(IS_FOUR, reason="a pipeline of two ranks says it all")
def test_one_chunk_for_each_virtual_stage() -> None:
    layout = Layout(pp=2, virtual_stages=2)
    runtime = start(layout, seed=1)
    try:
        with pytest.raises(ValueError, match=r"model_chunks: 1 of them, and parallel\.virtual_stages = 2"):
            Learner(build_chunks(FAMILIES["r4b"].build, layout)[:1], runtime, Optim(), total_steps=10)
    finally:
        runtime.stop()
