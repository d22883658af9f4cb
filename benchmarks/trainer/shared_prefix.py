"""One BPO update with every prompt packed once, against the same update with the prompt copied per response.

    r4b bench trainer shared_prefix

The time is `Learner.step`: forward, loss, backward, optimizer. The floor is the unshared time divided by the ratio of
FLOPs (`r4b_core.models.r4b.flops`): what sharing would take if it saved all that it can save. So the table's floor/ours
is the measured gain over the ideal gain. The unshared update is no straw man: its images go through the ViT once too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.turns import in_turns
from r4b_core.config.recipe import BpoConfig, ModelConfig, OptimConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import PolicyHead
from r4b_core.losses.policy import response_row_weights
from r4b_core.models.r4b.config import resolve
from r4b_core.models.r4b.flops import forward_flops
from r4b_core.models.r4b.model import build_model
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import Runtime
from tests.models.build import random_prompt, random_tokens


@dataclass(frozen=True)
class Load:
    """Groups of one prompt (text tokens around one image) and 2g responses, packed to ``capacity``."""

    groups: int
    text: int
    grid: tuple[int, int]
    thinking: int
    direct: int
    turns: int
    capacity: int = 4096
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> int:
        return self.text + self.grid[0] * (self.grid[1] + 1)


LOADS = {
    # The demo's shapes: 16 prompts of 25 tokens, 15 of them an image's.
    "demo": Load(groups=16, text=10, grid=(3, 4), thinking=22, direct=4, turns=15),
    # Where prompts dominate, as in RL on real images: 512 tokens, 400 of them an image's.
    "prompt512_hidden256": Load(
        groups=2,
        text=112,
        grid=(20, 19),
        thinking=128,
        direct=16,
        turns=3,
        shape=dict(
            num_layers=4,
            hidden_size=256,
            ffn_hidden_size=768,
            num_heads=8,
            num_kv_heads=4,
            vision_num_layers=2,
            vision_grid=(20, 19),
        ),
    ),
}


def batches_of(load: Load, config: BpoConfig, share: bool) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(0)
    prompts = [random_prompt(generator, load.text // 2, [load.grid], load.text - load.text // 2, 16)] * load.groups
    lengths = [load.thinking] * config.group_size + [load.direct] * config.group_size
    weights = response_row_weights(
        torch.tensor(lengths),
        config.mode_token_weight,
        torch.tensor([1, 2]).repeat_interleave(config.group_size),
        True,
        config.reduction,
        load.thinking,
    )
    columns = list(zip(weights.weight.split(lengths), weights.share.split(lengths), strict=True))
    groups = [
        [
            Response(
                random_tokens(generator, length),
                weight.tolist(),
                {
                    "share": shared.tolist(),
                    "old_logprob": -4.0,
                    "ref_logprob": -4.0,
                    "advantage": float(torch.randn((), generator=generator)),
                },
            )
            for length, (weight, shared) in zip(lengths, columns, strict=True)
        ]
        for _ in prompts
    ]
    return pack_groups_for_rl(prompts, groups, load.capacity, share_prefix=share)[0]


@pytest.mark.parametrize("name", LOADS)
def test_bpo_update(name: str, benchmark: Any, runtime: Runtime) -> None:
    load, config = LOADS[name], BpoConfig()
    model_config = ModelConfig(shape=load.shape)
    # A tiny rate: the weights stay where they are, whatever the number of updates.
    learner = Learner(
        [build_model(model_config, ParallelConfig(), 0)],
        runtime,
        OptimConfig(lr=1e-9),
        total_steps=1000,
        freeze=config.freeze,
    )
    head = PolicyHead(config)
    batches = {share: batches_of(load, config, share) for share in (True, False)}

    def update(share: bool) -> Callable[[], float]:
        return lambda: learner.step(batches[share], head).loss

    shared, unshared = update(True)(), update(False)()
    assert shared == pytest.approx(unshared, rel=1e-4)
    times = in_turns({"shared": update(True), "unshared": update(False)}, load.turns)
    benchmark.pedantic(update(True), rounds=1)

    shape = resolve(model_config)
    flops = {share: forward_flops(shape, batches[share]).update("vision" in config.freeze) for share in (True, False)}
    ideal = flops[False] / flops[True]
    seconds = times.seconds
    gain = seconds["unshared"] / seconds["shared"]
    benchmark.extra_info.update(
        ours=seconds["shared"],
        rivals={"prompt per response": seconds["unshared"]},
        floor_seconds=seconds["unshared"] / ideal,
        clock=times.clock,
        wall_seconds=times.wall,
        flops=flops[True],
        flops_unshared=flops[False],
        tokens={str(share): [batch.num_tokens for batch in each] for share, each in batches.items()},
        gain=gain,
        ideal_gain=ideal,
        measured_over_ideal=gain / ideal,
        load=f"{load.groups} groups, prompt {load.prompt} tokens, {config.group_size} x {load.thinking} + "
        f"{config.group_size} x {load.direct}",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(
        f"\n{name}: {gain:.2f}x of ideal {ideal:.2f}x = {gain / ideal:.2f} ({times.clock}; "
        f"{seconds['shared'] * 1e3:.0f} ms shared, {seconds['unshared'] * 1e3:.0f} ms unshared)"
    )
