"""Bi-mode Policy Optimization (R-4B section 3, Eq. 1) and its baselines, which differ by switches alone.

prompts -> g thinking + g direct rollouts each -> reward -> advantage over the union of the 2g -> pack every group with
its prompt once -> clipped policy loss with KL to the annealed model -> update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r4b_core.config.recipe import BpoConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.boards import make_samples
from r4b_core.data.encoding import EncodedPrompt, encode_prompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.data.schema import Sample
from r4b_core.losses.heads import PolicyHead, row_logprobs
from r4b_core.losses.policy import response_row_weights
from r4b_core.models.r4b.model import R4BModel
from r4b_core.modes import Mode
from r4b_core.parallel import checkpoint
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.engine import EmbeddedEngine, bimode_requests
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Group, Request, SamplingParams
from r4b_core.stages.anneal import packing
from r4b_core.stages.job import Job, Stage, mean_metrics
from r4b_core.telemetry.bimode import bimode_metrics, probe_metrics
from r4b_core.telemetry.locate import REFERENCE
from r4b_kernels import group_advantage

ROLLOUT_STREAM, PROBE_STREAM = 1, 2
RESAMPLE_ROUNDS = 3


def bpo(job: Job) -> None:
    config, timeline = job.recipe.bpo, job.run.timeline
    if config.steps == 0:
        return
    stage = job.begin("bpo", config.optim, config.steps, freeze=config.freeze)
    reference = reference_model(job, stage) if config.kl_coef > 0 else None
    engine = EmbeddedEngine(job.model, job.tokenizer.mode_tokens, job.tokenizer.vocab_size)
    head = PolicyHead(config)

    with Verifier(mathematics=False) as verifier:  # a board's answers are digits
        reward = AnswerReward(verifier, config.length_cost, config.max_new_tokens)
        for step in stage.remaining():
            values = {}
            if config.probe_every and step % config.probe_every == 0:
                values |= probe(job, engine, reward, step)
            groups, prompts = collect(job, engine, reward, step)
            batches = pack(job, groups, prompts)
            with timeline("reference"):
                if reference is not None:
                    add_column(job, stage, batches, "ref_logprob", reference)
                if config.old_logprob == "recompute":
                    add_column(job, stage, batches, "old_logprob", job.model)
            with timeline("update"):
                updates = [stage.learner.step(batches, head) for _ in range(config.epochs)]
            result = next((update for update in updates if update.skipped), updates[-1])

            values |= bimode_metrics(groups, job.tokenizer.mode_tokens)
            if step % job.recipe.telemetry.rollouts_every == 0:
                job.run.write_rollouts("bpo", step + 1, groups)
            generated = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
            stage.log(result, {**mean_metrics(result), **values}, generated)


def collect(
    job: Job, engine: EmbeddedEngine, reward: AnswerReward, step: int
) -> tuple[list[Group], list[EncodedPrompt]]:
    """A step's groups, scored and with advantages, and their prompts.

    DAPO leaves out groups whose rewards are all equal and draws again, a few times at most.
    """
    config, timeline = job.recipe.bpo, job.run.timeline
    groups: list[Group] = []
    prompts: list[EncodedPrompt] = []
    for attempt in range(RESAMPLE_ROUNDS if config.drop_zero_variance else 1):
        samples = draw_prompts(job, step, attempt)
        encoded = [encode_prompt(job.tokenizer, sample) for sample in samples]
        with timeline("rollout"):
            drawn = rollouts(job, engine, samples, encoded, step, attempt)
        with timeline("reward"):
            reward.score_groups(drawn, job.tokenizer.decode)
            assign_advantages(drawn, config)
        for group, prompt in zip(drawn, encoded, strict=True):
            if len(groups) < config.prompts and (has_signal(group) or not config.drop_zero_variance):
                groups.append(group)
                prompts.append(prompt)
        if len(groups) == config.prompts:
            break
    return (groups, prompts) if groups else (drawn, encoded)


def draw_prompts(job: Job, step: int, attempt: int = 0) -> list[Sample]:
    """The prompts of a step; a pure function of the step, so a resumed run draws the same."""
    config = job.recipe.bpo
    return make_samples(
        "train", job.recipe.seed, f"bpo/{attempt}", step, config.prompts, config.mix, config=job.recipe.data
    )


def rollouts(
    job: Job, engine: EmbeddedEngine, samples: list[Sample], prompts: list[EncodedPrompt], step: int, attempt: int
) -> list[Group]:
    """g thinking and g direct responses per prompt (or 2g free ones), each with its own seed."""
    config = job.recipe.bpo

    def seed(prompt: int, k: int) -> int:
        return request_seed(job.recipe.seed, ROLLOUT_STREAM, step, attempt, prompt, k)

    requests = bimode_requests(len(prompts), config.group_size, config.rollouts == "free", seed)
    params = SamplingParams(config.max_new_tokens, config.temperature)
    return generate_groups(engine, job.runtime, samples, prompts, requests, params)


def assign_advantages(groups: Sequence[Group], config: BpoConfig) -> None:
    """A_k = (r_k - mean) / (std + eps) over the union of a group's 2g rewards, or as the switches say."""
    flat = [rollout for group in groups for rollout in group.rollouts]
    sizes = torch.tensor([0] + [len(group.rollouts) for group in groups])
    advantage = group_advantage(
        torch.tensor([rollout.reward for rollout in flat]),
        sizes.cumsum(0),
        torch.tensor([int(rollout.taken is Mode.THINKING) for rollout in flat]),
        baseline=config.advantage,
        std=config.std,
    ).advantage
    for rollout, value in zip(flat, advantage.tolist(), strict=True):
        rollout.advantage = value


def has_signal(group: Group) -> bool:
    return any(rollout.advantage != 0 for rollout in group.rollouts)


def pack(job: Job, groups: list[Group], prompts: list[EncodedPrompt]) -> list[PackedBatch]:
    """This rank's micro-batches, every group with its prompt once, and the columns that the loss needs."""
    config = job.recipe.bpo
    flat = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.tokens) for rollout in flat]
    weights = response_row_weights(
        torch.tensor(lengths),
        config.mode_token_weight,
        torch.tensor([rollout.forced for rollout in flat]),
        config.mode_token_loss == "include",
        config.reduction,
        config.max_new_tokens,
    )
    rows = zip(flat, weights.weight.split(lengths), weights.share.split(lengths), strict=True)
    responses = iter(
        Response(
            rollout.tokens,
            weight.tolist(),
            {"share": share.tolist(), "old_logprob": rollout.logprobs, "advantage": rollout.advantage},
        )
        for rollout, weight, share in rows
    )
    grouped = [[next(responses) for _ in group.rollouts] for group in groups]
    ranks = pack_groups_for_rl(prompts, grouped, share_prefix=config.share_prefix, ranks=job.runtime.dp, **packing(job))
    return ranks[job.runtime.dp_rank]


def reference_model(job: Job, stage: Stage) -> R4BModel:
    """The policy as it was before the first update; kept beside the checkpoints for resumed runs."""
    folder, reference = job.checkpoints(REFERENCE), job.new_model()
    if stage.done == 0:
        try:
            checkpoint.save(folder, 0, stage.learner, {}, keep=1)
        except checkpoint.CheckpointWriteError as error:
            raise ValueError(f"the reference policy must be on disk before BPO begins: {error}") from error
        reference.load_state_dict(job.model.state_dict())
    else:
        path = checkpoint.latest(folder)
        if path is None:
            raise ValueError(
                f"{folder}: the reference policy of this run is gone, so its KL term cannot go on: restore the folder, "
                "set bpo.kl_coef=0, or start a new run folder"
            )
        checkpoint.load_weights(path, [reference])
    return reference.requires_grad_(False)


def add_column(job: Job, stage: Stage, batches: list[PackedBatch], name: str, model: R4BModel) -> None:
    """Log-probabilities of all rows under ``model``, as a column of the batches."""
    temperature, group = job.recipe.bpo.temperature, job.runtime.cp_group

    def logprobs(model: R4BModel, batch: PackedBatch, hidden: torch.Tensor) -> torch.Tensor:
        return row_logprobs(model, batch, hidden, temperature)

    columns = stage.learner.forward_only(batches, logprobs, model=model, broadcast=True) or []
    for batch, column in zip(batches, columns, strict=True):
        if job.runtime.cp > 1:
            torch.distributed.all_reduce(column, group=group)
        batch.row_data[name] = column


def probe(job: Job, engine: EmbeddedEngine, reward: AnswerReward, step: int) -> dict[str, float]:
    """Free greedy answers to fixed held-out questions, before the step's update: does the model think, and where?"""
    config = job.recipe.bpo
    samples = make_samples(
        "held_out", job.recipe.seed, "probe", 0, config.probe_prompts, config.mix, config=job.recipe.data
    )
    prompts = [encode_prompt(job.tokenizer, sample) for sample in samples]
    requests = [
        Request(i, Mode.AUTO, request_seed(job.recipe.seed, PROBE_STREAM, step, i)) for i in range(len(prompts))
    ]
    params = SamplingParams(config.max_new_tokens, temperature=0.0)
    with job.run.timeline("evaluate"):
        groups = generate_groups(engine, job.runtime, samples, prompts, requests, params)
        reward.score_groups(groups, job.tokenizer.decode)
    return probe_metrics(groups, job.tokenizer.mode_tokens)
