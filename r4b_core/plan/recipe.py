"""A recipe read as work: the tokens of each stage's step and how they fall into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from r4b_core.config.load import RecipeError
from r4b_core.config.recipe import ModelConfig, Recipe
from r4b_core.plan.shapes import SHAPES, ModelShape, r4b_shape
from r4b_core.plan.work import Execution, Work, causal_pairs


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say about its data: means per sample.

    Attributes:
        text_tokens: of a sample; in BPO of its prompt.
        images: per sample.
        patches: ViT patches per image; None: a base view of the model (r4b), 1,024 elsewhere.
        response_tokens: of a rollout; None: all of ``bpo.max_new_tokens``.
    """

    text_tokens: int = 256
    images: int = 1
    patches: int | None = None
    response_tokens: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe: how it runs, and its work for any number of data-parallel ranks."""

    name: str
    steps: int
    samples: int
    sample_tokens: float
    capacity: int
    static: bool
    execution: Execution
    whole: Work
    longest_response: int = 0

    def work(self, dp: int) -> Work:
        """Of one data-parallel rank; a rank has at least one sample."""
        share = max(1 / dp, 1 / self.samples)
        tokens = self.whole.tokens * share
        count = max(1, math.ceil(tokens / self.capacity))
        part = share / count
        made = replace(
            self.whole,
            micro_batches=count,
            tokens=self.whole.tokens * part,
            pairs=self.whole.pairs * part,
            loss_rows=self.whole.loss_rows * part,
            patches=self.whole.patches * part,
            vision_pairs=self.whole.vision_pairs * part,
            samples=self.whole.samples * share,
            prompts=self.whole.prompts * share,
            responses=self.whole.responses * share,
        )
        return replace(made, tokens=float(self.capacity)) if self.static else made

    def fullest(self, dp: int) -> Work:
        """The same with every micro-batch as full as packing may make it and every response at its limit:
        what memory has to hold."""
        work = replace(self.work(dp), response_tokens=float(self.longest_response))
        if work.micro_batches == 1 and not self.static:
            return work
        grow = self.capacity / work.tokens
        return replace(
            work,
            tokens=float(self.capacity),
            loss_rows=min(float(self.capacity), work.loss_rows * grow),
            patches=work.patches * grow,
        )


def model_shape(model: ModelConfig) -> ModelShape:
    """The shape of a recipe's model.

    Raises:
        ValueError: a model that there is no shape of, naming those there are.
    """
    if model.family == "r4b":
        from r4b_core.parallel import device

        device.activate()  # before anything imports Megatron-Core

        from r4b_core.models.r4b.config import resolve

        return r4b_shape(f"r4b-{model.size}", resolve(model))
    name = f"{model.family}-{model.size}"
    if model.shape:
        raise ValueError(f"model.shape: overrides of {model.family} cannot be planned for; take one of its named sizes")
    return named_shape(name)


def named_shape(name: str) -> ModelShape:
    if name not in SHAPES:
        raise ValueError(f"model: there is no shape of {name!r}; there are {', '.join(SHAPES)}, and r4b by recipe")
    return SHAPES[name]


def stage_plans(recipe: Recipe, shape: ModelShape, assumed: Assumptions) -> list[StagePlan]:
    """The stages of a recipe that have steps.

    Raises:
        RecipeError: there is none, or a sample is longer than a micro-batch may be.
    """
    supervised = [_supervised(name, recipe, shape, assumed) for name in ("pretrain", "anneal", "distill")]
    plans = [plan for plan in (*supervised, _bpo(recipe, shape, assumed)) if plan.steps]
    if not plans:
        raise RecipeError(f"recipe {recipe.name}", ["every stage has steps: 0, so there is nothing to plan"])
    longest = max(plans, key=lambda plan: plan.sample_tokens)
    if longest.sample_tokens > recipe.packing.capacity:
        raise RecipeError(
            f"recipe {recipe.name}",
            [
                f"packing.capacity = {recipe.packing.capacity}: a sample of {longest.name} has "
                f"{math.ceil(longest.sample_tokens)} tokens (text and image) and must fit into one micro-batch; "
                f"the smallest that does is {-(-math.ceil(longest.sample_tokens) // 64) * 64}"
            ],
        )
    return plans


def _sight(shape: ModelShape, assumed: Assumptions) -> tuple[int, float, float]:
    """(tokens, patches, vision pairs) of a sample's images."""
    vision = shape.vision
    if vision is None:
        return 0, 0.0, 0.0
    base = vision.num_positions if vision.merge == 1 else 1024
    patches = assumed.patches or base
    tokens = patches // vision.merge + (1 if vision.merge == 1 else 0)
    images = assumed.images
    return images * tokens, float(images * patches), images * vision.attention_pairs(patches)


def _execution(recipe: Recipe, frozen: list[str], lr_scale: dict[str, float], reference: bool) -> Execution:
    def trains(prefix: str) -> bool:
        return not any(prefix.startswith(name) for name in [*frozen, *(k for k, v in lr_scale.items() if v == 0)])

    return Execution(
        dtype=recipe.model.dtype,
        sharding="zero1" if recipe.parallel.distributed_optimizer else "none",
        train_decoder=trains("decoder"),
        train_vision=trains("vision"),
        train_projector=trains("projector" if recipe.model.family == "r4b" else "vision.merger"),
        reference_copy=reference,
    )


def _supervised(name: str, recipe: Recipe, shape: ModelShape, assumed: Assumptions) -> StagePlan:
    """A stage of samples with their responses; of records a step takes whole packed sequences."""
    stage, capacity = getattr(recipe, name), recipe.packing.capacity
    sight, patches, pairs = _sight(shape, assumed)
    length = float(sight + assumed.text_tokens)
    is_packed = recipe.data.task == "records"
    samples = stage.batch_size * capacity / length if is_packed else float(stage.batch_size)
    teaches = name == "distill" and recipe.distill.logit_weight > 0 and recipe.distill.teacher is not None
    whole = Work(
        micro_batches=1,
        tokens=samples * length,
        pairs=causal_pairs(samples * length, length),
        loss_rows=samples * assumed.text_tokens,
        patches=samples * patches,
        vision_pairs=samples * pairs,
        samples=samples,
        scored=int(teaches),
    )
    execution = _execution(recipe, [], stage.optim.lr_scale, reference=teaches)
    return StagePlan(name, stage.steps, stage.batch_size, length, capacity, recipe.packing.static, execution, whole)


def _bpo(recipe: Recipe, shape: ModelShape, assumed: Assumptions) -> StagePlan:
    stage = recipe.bpo
    sight, patches, vision_pairs = _sight(shape, assumed)
    prompt, answers = float(sight + assumed.text_tokens), 2 * stage.group_size
    response = float(min(assumed.response_tokens or stage.max_new_tokens, stage.max_new_tokens))
    copies = 1 if stage.share_prefix else answers
    own = causal_pairs(prompt, prompt) * copies
    whole = Work(
        micro_batches=1,
        tokens=stage.prompts * (copies * prompt + answers * response),
        pairs=stage.prompts * (own + answers * (response * prompt + causal_pairs(response, response))),
        loss_rows=stage.prompts * answers * response,
        patches=stage.prompts * patches * copies,
        vision_pairs=stage.prompts * vision_pairs * copies,
        samples=stage.prompts,
        prompts=stage.prompts,
        prompt_tokens=prompt,
        responses=stage.prompts * answers,
        response_tokens=response,
        scored=int(stage.kl_coef > 0) + int(stage.old_logprob == "recompute"),
        updates=stage.epochs,
    )
    execution = _execution(recipe, stage.freeze, stage.optim.lr_scale, reference=stage.kl_coef > 0)
    capacity, static = recipe.packing.capacity, recipe.packing.static
    return StagePlan(
        "bpo",
        stage.steps,
        stage.prompts,
        prompt + stage.max_new_tokens,
        capacity,
        static,
        execution,
        whole,
        longest_response=stage.max_new_tokens,
    )
