"""Rollouts of the embedded engine against transformers' `generate` on the same weights.

    r4b bench rollout embedded

A BPO group is one prompt with 4 thinking and 4 direct responses. Every response runs to its budget of 40 tokens, so
both sides draw the same number. The first rival gets finished prompt embeddings, so it pays for no ViT, and returns
tokens alone; the engine pays, and returns log-probabilities and entropies too. The second rival does the same job as
the engine. All sample from the full distribution at temperature 1. Before the clock starts, greedy tokens must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.turns import in_turns
from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.config import resolve
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.modes import Mode, ModeTokens
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.engine import EmbeddedEngine, bimode_requests
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Request, SamplingParams
from tests.models.build import random_prompt
from tests.models.oracle import Oracle, make_oracle, to_megatron

BUDGET = 40
RESPONSES = 8
NEVER = 63  # as the turn end: the vocabulary that is drawn from ends before it
VOCABULARY = 63
TURNS = {1: 15, 16: 5}


def same_weights(config: ModelConfig) -> tuple[R4BModel, Oracle]:
    oracle = make_oracle(resolve(config)).requires_grad_(False)
    model = build_model(config, ParallelConfig(), 0)
    model.load_state_dict(to_megatron(dict(oracle.named_parameters()), oracle.shape), strict=False)
    return model, oracle


def transformers_generate(
    oracle: Oracle, prompts: list[EncodedPrompt], copies: int, sample: bool, **more: Any
) -> Callable:
    """A call that returns tokens [G * copies, BUDGET]; prompts are padded on the left."""
    longest = max(prompt.num_tokens for prompt in prompts)
    embeddings = torch.zeros(len(prompts), longest, oracle.shape.hidden_size)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        embeddings[row, longest - prompt.num_tokens :] = oracle.embeddings(prompt, [])
        mask[row, longest - prompt.num_tokens :] = 1
    embeddings, mask = (x.repeat_interleave(copies, 0) for x in (embeddings, mask))
    language_model = oracle.language_model
    language_model.set_attn_implementation("sdpa")
    options: dict[str, Any] = dict(do_sample=sample, max_new_tokens=BUDGET, eos_token_id=None, pad_token_id=0)
    if sample:
        options |= dict(temperature=1.0, top_k=0, top_p=1.0)
    # Keep it from the one token that the engine never draws.
    options |= {"suppress_tokens": [NEVER], **more}
    return lambda: language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)


def same_job(oracle: Oracle, prompts: list[EncodedPrompt], copies: int) -> Callable:
    """A call in which `generate` does all that the engine does: images through the ViT (once per prompt, though it
    would see every copy), prompt embeddings, tokens, and each token's log-probability and entropy."""

    def call() -> torch.Tensor:
        generate = transformers_generate(
            oracle, prompts, copies, True, return_dict_in_generate=True, output_logits=True
        )
        out = generate()
        logprobs = torch.stack(out.logits, 1).log_softmax(-1)
        drawn = logprobs.gather(-1, out.sequences[..., None])
        return torch.stack([drawn.squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)])

    return call


@pytest.mark.parametrize("groups", TURNS)
def test_bpo_groups(groups: int, benchmark: Any, runtime: Runtime) -> None:
    model, oracle = same_weights(ModelConfig())
    generator = torch.Generator().manual_seed(0)
    # The demo's prompts: about 25 tokens, 15 of them an image's.
    prompts = [random_prompt(generator, 5, [(3, 4)], 3 + i % 5, 16) for i in range(groups)]
    modes = ModeTokens(think_open=3, think_close=4, newline=5, blank_line=6, turn_end=NEVER)
    engine = EmbeddedEngine(model, modes, VOCABULARY)
    requests = bimode_requests(groups, RESPONSES // 2, False, lambda prompt, k: request_seed(prompt, k))
    params = SamplingParams(BUDGET)

    greedy = engine.generate(
        prompts, [Request(p, Mode.AUTO, 0) for p in range(groups)], SamplingParams(BUDGET, temperature=0.0)
    )
    theirs = transformers_generate(oracle, prompts, 1, sample=False)()
    assert [rollout.tokens for rollout in greedy] == theirs.tolist()
    rival = transformers_generate(oracle, prompts, RESPONSES, sample=True)
    count = sum(len(rollout.tokens) for rollout in engine.generate(prompts, requests, params))
    assert count == rival().numel() == groups * RESPONSES * BUDGET

    sides = {
        "ours": lambda: engine.generate(prompts, requests, params),
        "transformers": rival,
        "same job": same_job(oracle, prompts, RESPONSES),
    }
    times = in_turns(sides, TURNS[groups])
    benchmark.pedantic(lambda: engine.generate(prompts, requests, params), rounds=1)
    seconds = times.seconds
    rate = {name: count / value for name, value in seconds.items()}
    benchmark.extra_info.update(
        ours=seconds["ours"],
        rivals={
            "transformers generate": seconds["transformers"],
            "the same with images, log-probs, entropies": seconds["same job"],
        },
        clock=times.clock,
        wall_seconds=times.wall,
        tokens=count,
        tokens_per_second=rate,
        load=f"{groups} groups of {RESPONSES} responses of {BUDGET} tokens",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(
        f"\n{groups} groups: {rate['ours']:.0f} tokens/s, transformers {rate['transformers']:.0f} "
        f"({seconds['transformers'] / seconds['ours']:.1f}x, {times.clock})"
    )
