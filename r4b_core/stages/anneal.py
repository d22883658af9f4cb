"""Pre-training stand-in and bi-mode annealing: SFT on packed batches (R-4B section 2 and appendix B).

`pretrain` asks every visual token what it shows. `anneal` trains thinking and direct samples together; no label says
which is which. The mode of a sample follows R-4B's objective rule: k tries, none right -> thinking, else direct.
"""

from __future__ import annotations

from r4b_core.config.recipe import OptimConfig
from r4b_core.data.boards import StandInAnnotator, annotate, make_alignment, make_samples
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import encode_prompt, encode_sample, pack_alignment, pack_sft
from r4b_core.data.schema import Sample
from r4b_core.losses.heads import sft_head
from r4b_core.modes import Mode
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Request, SamplingParams
from r4b_core.stages.job import Job, Stage, mean_metrics

ANNOTATION_STREAM = 3


def pretrain(job: Job) -> None:
    """Vision-language alignment: the hidden state at every image token predicts the tile's digit and colour."""
    config = job.recipe.pretrain
    if config.steps == 0 or job.is_past("pretrain"):
        return
    stage = job.begin("pretrain", config.optim, config.steps)
    for step in stage.remaining():
        boards = make_alignment("train", job.recipe.seed, "pretrain", step, config.batch_size, job.recipe.data)
        batches = pack_alignment(job.tokenizer, boards, **packing(job))
        update(stage, batches[job.runtime.dp_rank])


def anneal(job: Job) -> None:
    """Bi-mode annealing, then the optional tail on one mode alone."""
    config = job.recipe.anneal
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
        batches = pack_sft([encode_sample(job.tokenizer, sample) for sample in samples], **packing(job))
        thinking = sum(sample.mode is Mode.THINKING for sample in samples) / len(samples)
        update(stage, batches[job.runtime.dp_rank], {"data/thinking_share": thinking})


def annealing_samples(job: Job, step: int, only: Mode | None = None) -> list[Sample]:
    """A step's samples with modes and responses; ``only`` gives them all one mode."""
    config, recipe = job.recipe.anneal, job.recipe
    samples = make_samples("train", recipe.seed, "anneal", step, config.batch_size, config.mix, config=recipe.data)
    if only is not None:
        return annotate(samples, mode=only)
    if config.annotator == "stand_in":
        answers = StandInAnnotator(recipe.seed).answers(samples, config.tries)
    else:
        answers = model_answers(job, samples, step)
    return annotate(samples, answers)


def model_answers(job: Job, samples: list[Sample], step: int) -> list[list[str]]:
    """k direct answers of the model itself to every sample, as R-4B's annotator gives them."""
    tries = job.recipe.anneal.tries
    prompts = [encode_prompt(job.tokenizer, sample) for sample in samples]
    requests = [
        Request(prompt, Mode.DIRECT, request_seed(job.recipe.seed, ANNOTATION_STREAM, step, prompt, k))
        for prompt in range(len(prompts))
        for k in range(tries)
    ]
    engine = EmbeddedEngine(job.model, job.tokenizer.mode_tokens, job.tokenizer.vocab_size)
    rollouts = engine.generate(prompts, requests, SamplingParams(max_new_tokens=8))
    texts = [job.tokenizer.decode(job.tokenizer.mode_tokens.split(rollout.tokens)[1]) for rollout in rollouts]
    return [texts[i : i + tries] for i in range(0, len(texts), tries)]


def update(stage: Stage, batches: list[PackedBatch], values: dict[str, float] | None = None) -> None:
    """One SFT update and its line of metrics."""
    with stage.job.run.timeline("update"):
        result = stage.learner.step(batches, sft_head)
    tokens = sum(batch.num_tokens for batch in batches) * stage.job.runtime.dp
    stage.log(result, {**mean_metrics(result), **(values or {})}, tokens)


def packing(job: Job) -> dict[str, int | None]:
    """How this job cuts its batches: capacity, divisibility and data-parallel ranks."""
    parallel, packed = job.recipe.parallel, job.recipe.packing
    return {
        "capacity": packed.capacity,
        "multiple": parallel.tp * parallel.cp,
        "pad_to": packed.capacity if packed.static else None,
        "ranks": job.runtime.dp,
    }


def _tail_optim(optim: OptimConfig, lr: float) -> OptimConfig:
    return optim.model_copy(update={"lr": lr, "schedule": "constant", "warmup_steps": 0})
