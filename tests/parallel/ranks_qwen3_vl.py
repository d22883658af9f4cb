"""Qwen3-VL under layouts of several ranks: the loss and every gradient of an SFT and a BPO step equal one rank's.

Batches carry images of different sizes, and one has none. Nothing here covers NCCL, streams or bfloat16.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from r4b_core.config.recipe import BpoConfig, ModelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import PolicyHead, sft_head
from r4b_core.models.qwen3_vl.config import resolve
from r4b_core.models.qwen3_vl.model import Qwen3VLModel, build_model
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import start
from tests.models.qwen3_vl_oracle import SMALL, random_prompt
from tests.parallel.harness import Layout, Model, Optim, compare_layouts, parameters_by_name, train

TWO_RANKS = {
    "dp2": Layout(),
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
}
FOUR_RANKS = {
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_sp_pp2": Layout(tp=2, pp=2, sequence_parallel=True),
    "tp2_cp2": Layout(tp=2, cp=2),
    "tp2_sp_cp2": Layout(tp=2, cp=2, sequence_parallel=True),
    "pp2_cp2": Layout(pp=2, cp=2),
    "tp2_dp2": Layout(tp=2),
    "pp2_dp2": Layout(pp=2),
    "cp2_dp2": Layout(cp=2),
    "tp4": Layout(tp=4),
}
LAYOUTS = FOUR_RANKS if os.environ.get("WORLD_SIZE") == "4" else TWO_RANKS
RESHARD = ("tp2_sp_pp2", "cp2_dp2") if LAYOUTS is FOUR_RANKS else ("tp2_sp", "pp2")
# Heads that every layout of four ranks divides.
SHAPE: dict[str, Any] = {
    **SMALL,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vision_hidden_size": 32,
    "vision_ffn_hidden_size": 48,
    "vision_num_heads": 4,
}
PROMPTS = [
    [(3, [(4, 6)], 2), (2, [(2, 4), (6, 2)], 3)],
    [(9, [], 1), (4, [], 2)],
    [(0, [(2, 2)], 1), (6, [], 1)],
    [(1, [(2, 8)], 4)],
]


def build(tie: bool) -> Any:
    model = ModelConfig(shape={**SHAPE, "tie_embeddings": tie})

    def stage(layout: Any, chunk: int = 0) -> Qwen3VLModel:
        return build_model(model, layout, seed=3, chunk=chunk)

    return stage


def keep_initial(model: Model) -> None:
    """The model's own initial weights do not depend on the layout: that is part of what is tested."""


def batches(share_prefix: bool) -> list[PackedBatch]:
    """Four micro-batches with made-up old log-probs and advantages; the second has no image."""
    generator, shape = torch.Generator().manual_seed(0), resolve(ModelConfig(shape=SHAPE))
    made = []
    for cases in PROMPTS:
        prompts = [random_prompt(generator, shape, *case) for case in cases]
        groups = []
        for number in range(len(prompts)):
            group = []
            for length in (6 + number, 3):
                tokens = torch.randint(0, 62, (length,), generator=generator).tolist()
                noise = torch.randn(2, length, generator=generator)
                columns = {"old_logprob": (-4 + 0.2 * noise[0]).tolist(), "advantage": float(noise[1, 0]), "share": 1.0}
                group.append(Response(tokens, columns=columns))
            groups.append(group)
        (packed,) = pack_groups_for_rl(prompts, groups, 256, share_prefix=share_prefix, multiple=4)
        made += packed
    assert not len(made[1].patches) and len(made[0].image_grid) == 3
    return made


def test_sft_step_with_a_head_of_its_own() -> None:
    print(compare_layouts(build(False), batches(share_prefix=False), sft_head, LAYOUTS, fill=keep_initial))


def test_bpo_step_with_the_embeddings_as_head() -> None:
    head = PolicyHead(BpoConfig(kl_coef=0, clip_low=0.3, clip_high=0.4))
    print(compare_layouts(build(True), batches(share_prefix=True), head, LAYOUTS, fill=keep_initial))


def test_a_checkpoint_continues_in_another_layout() -> None:
    """The tower is frozen but for its mergers, of which DeepStack's learn slowly."""
    optim = Optim(lr_scale={"vision": 0.0, "vision.merger": 1.0, "vision.deepstack": 0.1})
    folder = Path(os.environ["R4B_TEST_SHARED"]) / f"qwen3_vl_{os.environ['WORLD_SIZE']}"
    losses, weights = [], []
    for name in RESHARD:
        layout = LAYOUTS[name]
        runtime = start(layout, seed=1)
        try:
            learner = Learner([build(True)(layout)], runtime, optim, total_steps=10)
            if not losses:
                before = parameters_by_name(learner.model)
                train(learner, runtime, batches(share_prefix=True), sft_head, 2)
                path = checkpoint.save(folder, 2, learner, {})
            else:
                checkpoint.load(path, learner)
            weights.append(parameters_by_name(learner.model))
            losses += train(learner, runtime, batches(share_prefix=True), sft_head, 2)
        finally:
            runtime.stop()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    moved = {name for name, value in before.items() if not torch.equal(weights[0][name], value)}
    still = {name for name in before if name.startswith("vision.") and "merger" not in name and "deepstack" not in name}
    assert still and moved == before.keys() - still
    for one, other in zip(losses[:2], losses[2:], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=5e-6)
