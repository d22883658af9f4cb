"""The weights of a Hugging Face checkpoint straight into a model that was built, under any parallel layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from r4b_core.models.convert.huggingface import differences, open_checkpoint
from r4b_core.models.convert.settings import ConversionError
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.families import resolve
from r4b_core.parallel.sharded_files import drop_empty_objects


@torch.no_grad()
def load_weights(model: DecoderModel, folder: Path | str) -> None:
    """Fill this rank's part of a model from the folder, one parameter at a time; rounded to the model's own type.

    Call it before a :class:`Learner` is built. Not a collective: every rank reads the folder by itself.

    Raises:
        ConversionError: on every rank alike: the folder is damaged or incomplete, or of another model.
    """
    config, source = open_checkpoint(folder)
    if differing := differences(resolve(config), model.shape):
        raise ConversionError(
            f"{folder} holds another model than the one it is to be loaded into ({'; '.join(differing)}): build the "
            "model from read_config(folder)"
        )
    parts: dict[tuple[str, int | None], list[ShardedTensor]] = {}
    for part in _sharded_tensors(drop_empty_objects(model.sharded_state_dict())):
        layer = part.global_offset[0] if part.prepend_axis_num else None
        parts.setdefault((part.key, layer), []).append(part)
    for rule in source.rules:
        mine = parts.pop((rule.key, rule.layer), [])
        if mine:
            whole = rule.join(source.read)
            for part in mine:
                part.data.copy_(whole[_place(part)].reshape(part.data.shape))
    assert not parts, f"no rule fills {sorted(parts)}"


def _sharded_tensors(value: Any) -> Iterator[ShardedTensor]:
    """Every part of a parameter in a sharded state dict; its data shares the parameter's memory."""
    if isinstance(value, ShardedTensorFactory):
        yield from _sharded_tensors(value.build())
    elif isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sharded_tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from _sharded_tensors(item)


def _place(part: ShardedTensor) -> tuple[slice, ...]:
    """What part of one layer's parameter it is."""
    offset = part.global_offset[part.prepend_axis_num :]
    return tuple(slice(start, start + size) for start, size in zip(offset, part.local_shape, strict=True))
