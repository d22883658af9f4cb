"""The R-4B model under layouts of two ranks: losses and every gradient of annealing and BPO steps equal one rank's.

Batches carry images, and one has none. Nothing here covers NCCL, streams or bfloat16.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from r4b_core.config.recipe import BpoConfig, ModelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.boards import make_samples, write_response
from r4b_core.data.encoding import EncodedPrompt, encode_prompt, encode_response
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.data.tokenizer import ToyTokenizer
from r4b_core.losses.heads import PolicyHead, row_logprobs, sft_head
from r4b_core.models.r4b.model import build_model
from r4b_core.modes import Mode
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import start
from r4b_core.rollout.engine import EmbeddedEngine, bimode_requests
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import SamplingParams
from tests.parallel.harness import Layout, Model, Optim, compare_layouts

TWO_RANKS = {
    "dp2": Layout(),
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
}
FOUR_RANKS = {
    "tp2_pp2": Layout(tp=2, pp=2),
    "tp2_cp2": Layout(tp=2, cp=2),
    "tp2_sp_cp2": Layout(tp=2, cp=2, sequence_parallel=True),
    "pp2_cp2": Layout(pp=2, cp=2),
    "tp2_dp2": Layout(tp=2),
    "pp2_dp2": Layout(pp=2),
    "cp2_dp2": Layout(cp=2),
    "tp4": Layout(tp=4),
    "pp4": Layout(pp=4),
}
LAYOUTS = FOUR_RANKS if os.environ.get("WORLD_SIZE") == "4" else TWO_RANKS
MIX = {"read": 1.0, "count": 1.0, "value": 2.0}
TOKENIZER = ToyTokenizer()
# Four KV heads and layers, so that every layout of four ranks divides them.
MODEL = ModelConfig(shape={"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "num_layers": 4, "vision_num_heads": 4})


def build(layout: Any, chunk: int = 0) -> torch.nn.Module:
    return build_model(MODEL, layout, seed=3, chunk=chunk)


def keep_initial(model: Model) -> None:
    """The model's own initial weights do not depend on the layout: that is part of what is tested."""


def prompts_of(count: int) -> tuple[list[EncodedPrompt], list[Any]]:
    samples = make_samples("train", 0, "layouts", 0, count, MIX)
    return [encode_prompt(TOKENIZER, sample) for sample in samples], samples


def without_image(prompt: EncodedPrompt) -> EncodedPrompt:
    return dataclasses.replace(
        prompt,
        vision_index=torch.full_like(prompt.vision_index, PackedBatch.TEXT_INDEX),
        patches=prompt.patches[:0],
        image_grid=prompt.image_grid[:0],
    )


def sft_batches() -> list[PackedBatch]:
    """Four micro-batches; the second has no image."""
    prompts, samples = prompts_of(12)
    modes = [Mode.THINKING, Mode.DIRECT, Mode.DIRECT]
    answered = [
        dataclasses.replace(sample, response=write_response(sample, modes[i % 3])) for i, sample in enumerate(samples)
    ]
    responses = [[Response(encode_response(TOKENIZER, sample))] for sample in answered]
    batches = []
    for i in range(4):
        part = slice(3 * i, 3 * i + 3)
        shown = [without_image(prompt) for prompt in prompts[part]] if i == 1 else prompts[part]
        (packed,) = pack_groups_for_rl(shown, responses[part], 2048, share_prefix=False, multiple=4)
        batches += packed
    return batches


def bpo_batches(reduction: str = "token_mean") -> list[PackedBatch]:
    """Four micro-batches of one BPO group each, with made-up old and reference log-probs; the third has no image."""
    generator = torch.Generator().manual_seed(0)
    prompts, samples = prompts_of(4)
    batches = []
    for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        responses = []
        for mode in (Mode.THINKING, Mode.THINKING, Mode.DIRECT, Mode.DIRECT):
            tokens = TOKENIZER.encode(write_response(sample, mode))
            noise = torch.randn(3, len(tokens), generator=generator)
            share = 1.0 if reduction == "token_mean" else 1.0 / len(tokens)
            columns = {
                "old_logprob": (-4 + 0.2 * noise[0]).tolist(),
                "ref_logprob": (-4 + 0.2 * noise[1]).tolist(),
                "advantage": float(noise[2, 0]),
                "share": share,
            }
            responses.append(Response(tokens, share, columns))
        shown = without_image(prompt) if i == 2 else prompt
        (packed,) = pack_groups_for_rl([shown], [responses], 2048, multiple=4)
        batches += packed
    return batches


def test_annealing_step() -> None:
    print(compare_layouts(build, sft_batches(), sft_head, LAYOUTS, fill=keep_initial))


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_bpo_step(importance: str) -> None:
    config = BpoConfig(importance=importance, kl_coef=0.1, clip_low=0.3, clip_high=0.4)
    reduction = "token_mean" if importance == "token" else "sequence_mean"
    print(compare_layouts(build, bpo_batches(reduction), PolicyHead(config), LAYOUTS, fill=keep_initial))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_rollouts_are_those_of_one_rank(name: str) -> None:
    """Same tokens, and log-probs to 1e-5, whatever the layout that draws them; they agree with the training forward."""
    prompts, samples = prompts_of(4)
    requests = bimode_requests(4, 2, False, lambda prompt, k: request_seed(0, prompt, k))
    drawn = {}
    for key, layout in {"one": Layout(), name: LAYOUTS[name]}.items():
        runtime = start(layout, seed=1)
        try:
            learner = Learner([build(layout)], runtime, Optim(clip_grad=1.0), total_steps=10)
            engine = EmbeddedEngine(learner.model, TOKENIZER.mode_tokens, TOKENIZER.vocab_size)
            groups = generate_groups(engine, runtime, samples, prompts, requests, SamplingParams(24))
            drawn[key] = groups
            responses = [[Response(r.tokens) for r in group.rollouts] for group in groups]
            (batch,) = pack_groups_for_rl(prompts, responses, 4096, multiple=4)[0]
            (logprobs,) = learner.forward_only(
                [batch], lambda model, b, hidden: row_logprobs(model, b, hidden, 1.0), broadcast=True
            )
            if runtime.cp > 1:
                dist.all_reduce(logprobs, group=runtime.cp_group)
            behaviour = torch.tensor([value for g in groups for r in g.rollouts for value in r.logprobs])
            torch.testing.assert_close(logprobs, behaviour, atol=1e-4, rtol=0)
        finally:
            runtime.stop()
    for one, many in zip(drawn["one"], drawn[name], strict=True):
        assert [r.tokens for r in one.rollouts] == [r.tokens for r in many.rollouts]
        for first, second in zip(one.rollouts, many.rollouts, strict=True):
            torch.testing.assert_close(torch.tensor(first.logprobs), torch.tensor(second.logprobs), atol=1e-5, rtol=0)
