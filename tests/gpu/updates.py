"""Trains both families' toys on this machine's device and writes what came of it, for comparison with another's.

    python -m tests.gpu.updates OUT.json                      one rank: updates, rollouts, a checkpoint
    torchrun ... -m tests.gpu.updates OUT.json LAYOUT         updates in a layout of two ranks: tp, pp, cp or dp

With CUDA_VISIBLE_DEVICES="" the device is the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from r4b_core.config.recipe import ModelConfig, OptimConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.losses.heads import sft_head
from r4b_core.models.families import build_chunks, resolve
from r4b_core.modes import Mode, ModeTokens
from r4b_core.parallel import checkpoint, runtime
from r4b_core.parallel.learner import Learner
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.types import Request, SamplingParams
from tests.models import build, qwen3_vl_oracle

FAMILIES = ("r4b", "qwen3_vl")
LAYOUTS = {
    "tp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp": ParallelConfig(pp=2),
    "cp": ParallelConfig(cp=2),
    "dp": ParallelConfig(),
}
MODES = ModeTokens(think_open=3, think_close=4, newline=5, blank_line=6, turn_end=2)
VOCABULARY, BUDGET = 60, 12


def prompt_of(family: str, model: ModelConfig) -> EncodedPrompt:
    generator = torch.Generator().manual_seed(0)
    if family == "r4b":
        return build.random_prompt(generator, 5, [(3, 4), (2, 3)], 2, patch_size=16)
    return qwen3_vl_oracle.random_prompt(generator, resolve(model), 5, [(4, 6), (2, 2)], 2)  # type: ignore[arg-type]


def batches_of(prompt: EncodedPrompt, count: int, multiple: int) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        drawn = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in (9 + number, 6)]
        ((batch,),) = pack_groups_for_rl([prompt], [[Response(tokens) for tokens in drawn]], 256, multiple=multiple)
        made.append(batch)
    return made


def train(family: str, dtype: str, parallel: ParallelConfig, folder: Path | None) -> dict[str, Any]:
    """Four updates on two batches; with ``folder`` also rollouts, and the last update again from a checkpoint."""
    ranks = runtime.start(parallel, seed=0)
    try:
        model = ModelConfig(family=family, size="toy", dtype=dtype)
        chunks, prompt = build_chunks(model, parallel, 0), prompt_of(family, model)
        learner = Learner(chunks, ranks, OptimConfig(lr=2e-3), total_steps=8)
        batches = batches_of(prompt, 2, parallel.tp * parallel.cp)[ranks.dp_rank :: ranks.dp]
        batches = [batch.to(ranks.device) for batch in batches]
        results = [learner.step(batches, sft_head) for _ in range(3)]
        found: dict[str, Any] = {}
        if folder is not None:
            engine = EmbeddedEngine(chunks, MODES, VOCABULARY)
            requests = [Request(0, mode, seed) for seed, mode in enumerate((Mode.THINKING, Mode.DIRECT))]
            rollouts = engine.generate([prompt], requests, SamplingParams(BUDGET, temperature=0.0))
            found["tokens"] = [rollout.tokens for rollout in rollouts]
            found["logprobs"] = [rollout.logprobs for rollout in rollouts]
            path = checkpoint.save(folder, 3, learner, {"at": 3})
        results.append(learner.step(batches, sft_head))
        if folder is not None:
            again = Learner(build_chunks(model, parallel, 1), ranks, OptimConfig(lr=2e-3), total_steps=8)
            assert checkpoint.load(path, again) == {"at": 3}
            found["resumed"] = again.step(batches, sft_head).loss
        found["device"] = ranks.device.type
        return found | {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}
    finally:
        ranks.stop()


def main(out: str, layout: str | None = None) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for dtype in ("float32", "bfloat16") if layout is None else ("float32",):
                place = Path(folder) / family / dtype if layout is None else None
                found[f"{family} {dtype}"] = train(family, dtype, LAYOUTS.get(layout or "", ParallelConfig()), place)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
