"""Pre-training and bi-mode annealing: SFT on packed batches (R-4B section 2 and appendix B).

On records both take what the data engine made. On boards `pretrain`, a stand-in, asks every visual token what it shows,
and `anneal` makes its samples: their mode follows R-4B's objective rule, k tries, none right -> thinking, else direct.
Annealing trains thinking and direct samples together; no label says which is which.
"""

from __future__ import annotations

from dataclasses import replace

from r4b_core.config.recipe import OptimConfig
from r4b_core.data.annotate import StandInAnnotator, annotate
from r4b_core.data.batch import PackedBatch
from r4b_core.data.boards import make_alignment, make_samples, write_response
from r4b_core.data.encoding import encode_response
from r4b_core.data.packing import Response, pack_alignment, pack_groups_for_rl
from r4b_core.data.schema import Sample
from r4b_core.losses.heads import sft_head
from r4b_core.modes import Mode
from r4b_core.rewards.reward import AnswerReward
from r4b_core.rewards.verify import Verifier
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.gather import generate_groups
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Request, SamplingParams
from r4b_core.stages.job import Job, packing
from r4b_core.stages.supervised import train_on_records, update

ANNOTATION_STREAM = 3
MODEL_TRY_TOKENS = 8


def pretrain(job: Job) -> None:
    """Vision-language alignment: the hidden state at every image token predicts the tile's digit and colour."""
    config = job.recipe.pretrain
    if job.recipe.data.task == "records":
        return train_on_records(job, "pretrain", config, sft_head)
    if config.steps == 0 or job.is_past("pretrain"):
        return
    stage = job.begin("pretrain", config.optim, config.steps)
    ranks = job.runtime
    for step in stage.remaining():
        boards = make_alignment("train", job.recipe.seed, "pretrain", step, config.batch_size, job.recipe.data)
        mine = boards[ranks.dp_rank :: ranks.dp]
        update(stage, pack_alignment(job.tokenizer, mine, **packing(job)), head=sft_head)


def anneal(job: Job) -> None:
    """Bi-mode annealing, then the optional tail on one mode alone."""
    config = job.recipe.anneal
    if job.recipe.data.task == "records":
        return train_on_records(job, "anneal", config, sft_head)
    tail = config.tail_steps if config.tail != "none" else 0
    if config.steps + tail == 0 or job.is_past("anneal"):
        return
    stage = job.begin("anneal", config.optim, config.steps + tail)
    for step in stage.remaining():
        only = None
        if step >= config.steps:
            only = Mode(config.tail)
            stage.learner.optim = _tail_optim(config.optim, config.tail_lr)
        samples = annealing_samples(job, step, only)
        thinking = sum(sample.mode is Mode.THINKING for sample in samples) / len(samples)
        update(stage, pack_samples(job, samples), {"data/thinking_share": thinking}, sft_head)


def annealing_samples(job: Job, step: int, only: Mode | None = None) -> list[Sample]:
    """A step's samples with modes and responses; ``only`` gives them all one mode."""
    config, recipe = job.recipe.anneal, job.recipe
    samples = make_samples("train", recipe.seed, "anneal", step, config.batch_size, config.mix, config=recipe.data)
    if only is not None:
        return [replace(sample, mode=only, response=write_response(sample, only)) for sample in samples]
    if config.annotator == "model":
        tries = model_tries(job, samples, step)
    else:
        tries = StandInAnnotator(recipe.seed).respond(samples, config.tries)
    return annotate(samples, tries, AnswerReward(Verifier(mathematics=False)), write_response)


def model_tries(job: Job, samples: list[Sample], step: int) -> list[list[str]]:
    """k direct responses of the model itself to every sample."""
    tries = job.recipe.anneal.tries
    prompts = [job.processor.encode_prompt(sample) for sample in samples]
    requests = [
        Request(prompt, Mode.DIRECT, request_seed(job.recipe.seed, ANNOTATION_STREAM, step, prompt, k))
        for prompt in range(len(prompts))
        for k in range(tries)
    ]
    engine = EmbeddedEngine(job.chunks, job.tokenizer.mode_tokens, job.tokenizer.vocab_size)
    groups = generate_groups(engine, job.runtime, samples, prompts, requests, SamplingParams(MODEL_TRY_TOKENS))
    return [[job.tokenizer.decode(rollout.tokens) for rollout in group.rollouts] for group in groups]


def pack_samples(job: Job, samples: list[Sample]) -> list[PackedBatch]:
    """This rank's micro-batches: one segment per sample, loss on every response token."""
    prompts = [job.processor.encode_prompt(sample) for sample in samples]
    responses = [[Response(encode_response(job.tokenizer, sample))] for sample in samples]
    batches = pack_groups_for_rl(prompts, responses, share_prefix=False, ranks=job.runtime.dp, **packing(job))
    return batches[job.runtime.dp_rank]


def _tail_optim(optim: OptimConfig, lr: float) -> OptimConfig:
    return optim.model_copy(update={"lr": lr, "schedule": "constant", "warmup_steps": 0})
