"""Bi-mode Policy Optimization (R-4B section 3, Eq. 1) and its baselines, which differ by switches alone.

prompts -> g thinking + g direct rollouts each -> reward -> advantage over the union of the 2g -> pack every group with
its prompt once -> clipped policy loss with KL to the annealed model -> update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r4b_core.config.recipe import BpoConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.data.prompts import Prompt
from r4b_core.losses.heads import PolicyHead, row_logprobs
from r4b_core.losses.policy import response_row_weights
from r4b_core.models.decoder import DecoderModel
from r4b_core.modes import Mode
from r4b_core.parallel import checkpoint
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.engine import EmbeddedEngine, bimode_requests
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Group, Request, SamplingParams
from r4b_core.stages.job import Job, Stage, mean_metrics, packing
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
    engine = EmbeddedEngine(job.chunks, job.tokenizer.mode_tokens, job.tokenizer.vocab_size)
    head = PolicyHead(config)

    job.source.restore(stage.state.get("source", {}))
    stage.keep("source", lambda: job.source.state)

    with Verifier(mathematics=job.source.mathematics) as verifier:
        reward = AnswerReward(verifier, config.length_cost, config.max_new_tokens)
        for step in stage.remaining():
            values = {}
            if config.probe_every and step % config.probe_every == 0:
                values |= probe(job, engine, reward, step)
            groups, prompts, drawn = collect(job, engine, reward, step)
            values |= drawn
            batches = [batch.to(job.runtime.device) for batch in pack(job, groups, prompts)]
            with timeline("reference"):
                if reference is not None:
                    add_column(job, stage, batches, "ref_logprob", reference)
                if config.old_logprob == "recompute":
                    add_column(job, stage, batches, "old_logprob", job.chunks)
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
) -> tuple[list[Group], list[EncodedPrompt], dict[str, float]]:
    """A step's groups, scored and with advantages, their prompts, and what the source has to say about them.

    DAPO leaves out groups whose rewards are all equal and draws again, a few times at most.
    """
    config, timeline = job.recipe.bpo, job.run.timeline
    groups: list[Group] = []
    prompts: list[EncodedPrompt] = []
    all_drawn: list[tuple[Group, EncodedPrompt]] = []
    for attempt in range(RESAMPLE_ROUNDS if config.drop_zero_variance else 1):
        asked = job.source.draw(step, attempt)
        if not asked:
            break
        with timeline("rollout"):
            drawn = rollouts(job, engine, asked, step, attempt)
        with timeline("reward"):
            reward.score_groups(drawn, job.tokenizer.decode)
            assign_advantages(drawn, config)
        for group, prompt in zip(drawn, asked, strict=True):
            all_drawn.append((group, prompt.encoded))
            if len(groups) < config.prompts and (has_signal(group) or not config.drop_zero_variance):
                groups.append(group)
                prompts.append(prompt.encoded)
        if len(groups) == config.prompts:
            break
    values = job.source.learn([group for group, _ in all_drawn])
    if not groups:
        # An update needs rows, and these move nothing.
        last = all_drawn[-config.prompts :]
        groups, prompts = [group for group, _ in last], [prompt for _, prompt in last]
    return groups, prompts, values


def rollouts(job: Job, engine: EmbeddedEngine, prompts: Sequence[Prompt], step: int, attempt: int) -> list[Group]:
    """g thinking and g direct responses per prompt (or 2g free ones), each with its own seed."""
    config = job.recipe.bpo

    def seed(prompt: int, k: int) -> int:
        return request_seed(job.recipe.seed, ROLLOUT_STREAM, step, attempt, prompt, k)

    requests = bimode_requests(len(prompts), config.group_size, config.rollouts == "free", seed)
    return generate(job, engine, prompts, requests, SamplingParams(config.max_new_tokens, config.temperature))


def generate(
    job: Job, engine: EmbeddedEngine, prompts: Sequence[Prompt], requests: list[Request], params: SamplingParams
) -> list[Group]:
    samples, encoded = [prompt.sample for prompt in prompts], [prompt.encoded for prompt in prompts]
    return generate_groups(engine, job.runtime, samples, encoded, requests, params)


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


def reference_model(job: Job, stage: Stage) -> list[DecoderModel]:
    """The policy as it was before the first update; kept beside the checkpoints for resumed runs."""
    folder, reference = job.checkpoints(REFERENCE), job.new_chunks()
    if stage.done == 0:
        try:
            checkpoint.save(folder, 0, stage.learner, {}, keep=1)
        except checkpoint.CheckpointWriteError as error:
            raise ValueError(f"the reference policy must be on disk before BPO begins: {error}") from error
        for chunk, policy in zip(reference, job.chunks, strict=True):
            chunk.load_state_dict(policy.state_dict())
    else:
        path = checkpoint.latest(folder)
        if path is None:
            raise ValueError(
                f"{folder}: the reference policy of this run is gone, so its KL term cannot go on: restore the folder, "
                "set bpo.kl_coef=0, or start a new run folder"
            )
        checkpoint.load_weights(path, reference)
    return [chunk.requires_grad_(False) for chunk in reference]


def add_column(job: Job, stage: Stage, batches: list[PackedBatch], name: str, model: list[DecoderModel]) -> None:
    """Log-probabilities of all rows under ``model`` (its chunks), as a column of the batches."""
    temperature, group = job.recipe.bpo.temperature, job.runtime.cp_group

    def logprobs(model: DecoderModel, batch: PackedBatch, hidden: torch.Tensor) -> torch.Tensor:
        return row_logprobs(model, batch, hidden, temperature)

    columns = stage.learner.forward_only(batches, logprobs, model=model, broadcast=True) or []
    for batch, column in zip(batches, columns, strict=True):
        if job.runtime.cp > 1:
            torch.distributed.all_reduce(column, group=group)
        batch.row_data[name] = column


def probe(job: Job, engine: EmbeddedEngine, reward: AnswerReward, step: int) -> dict[str, float]:
    """Free greedy answers to fixed held-out questions, before the step's update: does the model think, and where?"""
    prompts = job.source.probes()
    requests = [
        Request(i, Mode.AUTO, request_seed(job.recipe.seed, PROBE_STREAM, step, i)) for i in range(len(prompts))
    ]
    params = SamplingParams(job.recipe.bpo.max_new_tokens, temperature=0.0)
    with job.run.timeline("evaluate"):
        groups = generate(job, engine, prompts, requests, params)
        reward.score_groups(groups, job.tokenizer.decode)
    return probe_metrics(groups, job.tokenizer.mode_tokens)
