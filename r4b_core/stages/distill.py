"""Distillation: SFT on a teacher's curated responses (MMFineReason section 5.1), and on its distribution if asked.

A packed sequence -> the teacher's most probable tokens at every response token (evaluated on the fly, or read from the
files) -> cross entropy on the response and divergence from the teacher, both without logits [T, V] -> update.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from r4b_core.config.recipe import Recipe
from r4b_core.data.batch import PackedBatch
from r4b_core.losses.heads import DistillHead, row_topk, sft_head
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.families import resolve
from r4b_core.parallel import checkpoint
from r4b_core.stages.job import Job, Stage
from r4b_core.stages.supervised import train_on_records
from r4b_core.telemetry.locate import locate


def distill(job: Job) -> None:
    config = job.recipe.distill
    if config.steps == 0 or job.is_past("distill"):
        return
    if not config.logit_weight:
        return train_on_records(job, "distill", config, sft_head)
    head = DistillHead(config)
    if config.teacher is None:
        return train_on_records(job, "distill", config, head, teacher_slots=config.teacher_top_k)
    teacher = teacher_model(job)

    def ask(stage: Stage, batches: list[PackedBatch]) -> None:
        with job.run.timeline("reference"):
            add_teacher(job, stage, batches, teacher)

    train_on_records(job, "distill", config, head, prepare=ask)


def check_teacher(recipe: Recipe) -> None:
    """Can ``distill.teacher`` teach this recipe's model? To be asked before anything is launched.

    Raises:
        ValueError: there is no complete checkpoint, or it is of another family or vocabulary.
    """
    if recipe.distill.teacher is None or not recipe.distill.steps:
        return
    _, teacher = find_teacher(recipe)
    mine, theirs = resolve(recipe.model), resolve(teacher.model)
    if teacher.model.family != recipe.model.family:
        raise ValueError(
            f"distill.teacher: {recipe.distill.teacher} is of the family {teacher.model.family} and model.family is "
            f"{recipe.model.family}, whose tokens and image features are others: give a teacher of the same family"
        )
    for name in ("vocab_size", "patch_size"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ValueError(
                f"distill.teacher: {recipe.distill.teacher} has {name} = {getattr(theirs, name)} and the model "
                f"{getattr(mine, name)}: a teacher reads the same tokens and patches"
            )


def find_teacher(recipe: Recipe) -> tuple[Path, Recipe]:
    """(checkpoint, recipe) of ``distill.teacher``."""
    assert recipe.distill.teacher is not None
    try:
        path, file = locate(Path(recipe.distill.teacher))
        return path, Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"distill.teacher: {error}") from error


def teacher_model(job: Job) -> list[DecoderModel]:
    """The teacher in this run's layout, whatever layout it was trained in."""
    path, recipe = find_teacher(job.recipe)
    teacher = job.new_chunks(recipe.model)
    checkpoint.load_weights(path, teacher)
    return [chunk.requires_grad_(False) for chunk in teacher]


def add_teacher(job: Job, stage: Stage, batches: list[PackedBatch], teacher: list[DecoderModel]) -> None:
    """The columns ``teacher_ids`` and ``teacher_logprobs`` of the batches, on the last pipeline stage."""
    config, group = job.recipe.distill, job.runtime.cp_group

    def topk(model: DecoderModel, batch: PackedBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return row_topk(model, batch, hidden, config.teacher_top_k, config.temperature)

    said = stage.learner.forward_only(batches, topk, model=teacher)
    for batch, columns in zip(batches, said or (), strict=said is not None):
        for name, column in zip(("teacher_ids", "teacher_logprobs"), columns, strict=True):
            if job.runtime.cp > 1:
                torch.distributed.all_reduce(column, group=group)
            batch.row_data[name] = column
