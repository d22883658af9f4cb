"""Does a model of real width train on this device, how fast, and in how much memory: both families, a few updates.

    python benchmarks/train_speed.py               four decoder layers of R-4B's and Qwen3-VL-8B's width, and the toys
    python benchmarks/train_speed.py --rehearse    the toys alone, for a CPU

One stream of packed prompts with an image each and two responses, bfloat16, full recomputation, one rank. The first two
updates compile and warm up; the others are timed.
"""

from __future__ import annotations

import sys
import time

import torch

from r4b_core.config.recipe import ModelConfig, OptimConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import sft_head
from r4b_core.models.families import build_chunks, resolve
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt
from r4b_core.parallel import device, runtime
from r4b_core.parallel.learner import Learner
from r4b_core.telemetry.console import memory_gb

WARM_UP, TIMED = 2, 5
SHORT = {"num_layers": 4, "vision_num_layers": 4}
# (family, size, shape, rows and columns of an image in patches, packing capacity)
TOYS = [("r4b", "toy", {}, (3, 4), 512), ("qwen3_vl", "toy", {}, (4, 6), 512)]
WIDE = [
    ("r4b", "4b", SHORT, (27, 27), 16384),
    ("qwen3_vl", "8b", {**SHORT, "deepstack_layers": [0, 1, 2]}, (32, 32), 16384),
]


def prompt_of(model: ModelConfig, grid: tuple[int, int]) -> EncodedPrompt:
    """Sixteen words, an image, sixteen words."""
    config, patches = resolve(model), grid[0] * grid[1]
    stride = getattr(config, "merge_size", 1) ** 2
    text = [PackedBatch.TEXT_INDEX] * 16
    index = torch.tensor([*text, *range(0, patches, stride), *text])
    parts = (torch.randint(0, 50, index.shape), index, torch.randn(patches, config.patch_dim))
    kind = Qwen3VLPrompt if model.family == "qwen3_vl" else EncodedPrompt
    return kind(*parts, torch.tensor([[1, *grid]]))


def measure(family: str, size: str, shape: dict[str, object], grid: tuple[int, int], capacity: int) -> str:
    parallel = ParallelConfig(recompute="full")
    ranks = runtime.start(parallel, seed=0)
    try:
        model = ModelConfig(family=family, size=size, shape=shape, dtype="bfloat16")
        learner = Learner(build_chunks(model, parallel, 0), ranks, OptimConfig(lr=1e-4), total_steps=WARM_UP + TIMED)
        prompt = prompt_of(model, grid)
        response = Response(torch.randint(0, 50, (64,)).tolist())
        count = capacity // (prompt.num_tokens + 128)
        ((batch, *_),) = pack_groups_for_rl([prompt] * count, [[response, response]] * count, capacity)
        losses = []
        for step in range(WARM_UP + TIMED):
            if step == WARM_UP:
                device.synchronize()
                started = time.perf_counter()
            losses.append(learner.step([batch.to(ranks.device)], sft_head).loss)
        device.synchronize()
        seconds = (time.perf_counter() - started) / TIMED
    finally:
        ranks.stop()
    if not losses[-1] < losses[0]:
        raise SystemExit(f"{family} {size}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f} on one batch")
    return (
        f"{family} {size} {shape or ''} on {ranks.device}: {batch.num_tokens / seconds:,.0f} tokens/s, "
        f"{seconds:.3f} s an update of {batch.num_tokens} tokens and {len(batch.patches)} patches, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {memory_gb():.2f} GB at most"
    )


def main(rehearse: bool) -> None:
    for case in TOYS if rehearse else [*TOYS, *WIDE]:
        print(measure(*case), flush=True)


if __name__ == "__main__":
    main("--rehearse" in sys.argv[1:])
