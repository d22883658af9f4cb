"""Rollouts over all ranks: data- and context-parallel ranks each draw for a share of the prompts, then all know all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.schema import Sample
from r4b_core.modes import Mode
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.types import FinishReason, Group, Request, Rollout, SamplingParams


def generate_groups(
    engine: EmbeddedEngine,
    runtime: Runtime,
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    requests: Sequence[Request],
    params: SamplingParams,
) -> list[Group]:
    """One group per prompt with its rollouts in the order of the requests, the same list on every rank."""
    shares = runtime.dp * runtime.cp
    mine = runtime.dp_rank * runtime.cp + runtime.cp_rank
    chosen = [i for i in range(len(prompts)) if i % shares == mine]
    place = {prompt: row for row, prompt in enumerate(chosen)}
    own = [
        dataclasses.replace(request, prompt=place[request.prompt]) for request in requests if request.prompt in place
    ]
    drawn = engine.generate([prompts[i] for i in chosen], own, params)
    by_rank = runtime.gather([dataclasses.asdict(rollout) for rollout in drawn], runtime.dp_cp_group)
    queues = [iter(rows) for rows in by_rank]
    # The group's ranks come in data-parallel order with context ranks side by side or not; find each one's share.
    order = runtime.gather(mine, runtime.dp_cp_group)
    source = {share: queues[position] for position, share in enumerate(order)}
    groups = [Group(sample, prompt.tokens.tolist()) for sample, prompt in zip(samples, prompts, strict=True)]
    for request in requests:
        groups[request.prompt].rollouts.append(_restore(next(source[request.prompt % shares])))
    return groups


def _restore(row: dict) -> Rollout:
    return Rollout(
        **{**row, "mode": Mode(row["mode"]), "taken": Mode(row["taken"]), "finish": FinishReason(row["finish"])}
    )
