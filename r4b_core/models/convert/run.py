"""Conversions of whole checkpoints, one parameter in memory at a time; see docs/convert.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from r4b_core.config.recipe import ModelConfig, Recipe
from r4b_core.models.convert import files, megatron
from r4b_core.models.convert.files import OnProgress, Stream
from r4b_core.models.convert.huggingface import (
    BYTES,
    CONFIG,
    INDEX,
    SINGLE,
    Entry,
    convert_module,
    differences,
    model_of,
    open_checkpoint,
    open_weights,
    read_header,
    read_json,
)
from r4b_core.models.convert.rules import Rule
from r4b_core.models.convert.settings import ConversionError
from r4b_core.models.convert.shards import Group, copied, filled, write_safetensors
from r4b_core.models.families import resolve
from r4b_core.parallel import manifest
from r4b_core.parallel.sharded_files import METADATA

UNUSED = "unused.safetensors"
# The converted folder is laid out as a run folder, whose first stage has done no step yet.
RECIPE = "recipe.resolved.yaml"
CHECKPOINT = f"checkpoints/pretrain/{manifest.step_name(0)}"
PART_BYTES = 1 << 30
SHARD_BYTES = 5 * 10**9
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_LAYOUT = dict(world=1, tp=1, pp=1, cp=1, dp=1, sequence_parallel=False, distributed_optimizer=False, virtual_stages=1)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Making:
    """What a folder for Megatron-Core is made of.

    Attributes:
        read: a tensor by the name that the rules have for it.
        unused: tensors that the model does not need and an export gives back, by the name they get there.
        companions: configuration, tokenizer and processor files.
        stamp: says whether it was made of the same things before.
    """

    model: ModelConfig
    rules: Sequence[Rule]
    read: Callable[[str], Tensor]
    unused: Mapping[str, Entry]
    companions: Mapping[str, bytes]
    stamp: Any


def to_megatron(
    folder: Path | str, target: Path | str, *, part_bytes: int = PART_BYTES, on_progress: OnProgress | None = None
) -> ModelConfig:
    """Convert a Hugging Face checkpoint to ``target``: a folder for ``model.init_from``, ``r4b eval`` and the like.

    Raises:
        ConversionError: listing all that is wrong with ``folder``; or ``target`` cannot be written.
    """
    model, source = open_checkpoint(folder)
    companions = {path.name: path.read_bytes() for path in files.companions(source.folder)}
    shards = {entry.file for entry in [*source.entries.values(), *source.unused.values()]}
    stamp = [files.stamps(sorted(shards)), files.digests(source.folder / name for name in companions)]
    making = Making(model, source.rules, source.read, source.unused, companions, stamp)
    return write_megatron(making, Path(target).resolve(), part_bytes, on_progress)


def write_megatron(making: Making, target: Path, part_bytes: int, on_progress: OnProgress | None) -> ModelConfig:
    """Write ``target``, whose model's processor is ``target`` itself where there is a tokenizer."""
    recipe = _recipe(making, target)
    model = recipe.model
    record = _record("to-megatron", model, [making.stamp, part_bytes])
    if files.is_done(target, record):
        return model
    dtype = _TORCH[model.dtype]
    groups = {
        f"{CHECKPOINT}/__0_{number}.distcp": rules
        for number, rules in enumerate(_cut(making.rules, lambda rule: rule.numel * dtype.itemsize, part_bytes))
    }
    small = megatron.small_files({"stage": "pretrain", "step": 0, "converted": record})
    with files.workplace(target, record, on_progress) as place:
        sizes = {
            name: sum(rule.numel * dtype.itemsize + megatron.OVERHEAD for rule in rules)
            for name, rules in groups.items()
        }
        unused = [copied(name, entry) for name, entry in making.unused.items()]
        sizes[UNUSED] = sum(group.size for group in unused)
        place.expect(sizes)
        facts = {
            name: place.part(name, partial(megatron.write_rules, rules=rules, read=making.read, dtype=dtype))
            for name, rules in groups.items()
        }
        if unused:
            place.part(UNUSED, partial(write_safetensors, groups=unused))
        metadata = megatron.contents(
            making.rules, {Path(name).name: fact["extra"] for name, fact in facts.items()}, dtype
        )
        for name, data in {**small, METADATA: metadata}.items():
            path = f"{CHECKPOINT}/{name}"
            facts[path] = place.part(path, partial(_write_bytes, data=data))
        described = {Path(name).name: {key: fact[key] for key in ("size", "sha256")} for name, fact in facts.items()}
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
        for name, data in {**making.companions, RECIPE: text.encode()}.items():
            files.write_bytes(place.content / name, data)
        about = {"format": manifest.FORMAT, "step": 0, "layout": _LAYOUT, "files": described}
        place.publish({f"{CHECKPOINT}/{manifest.MANIFEST}": about})
    return model


def _recipe(making: Making, target: Path) -> Recipe:
    """What `r4b eval` and ``model.init_from`` read of a converted folder: a run whose stages have no steps."""
    processor = str(target) if "tokenizer.json" in making.companions else None
    model = making.model.model_copy(update={"processor": processor, "init_from": None})
    if processor is None and model.family != "r4b":
        raise ConversionError(
            f"tokenizer.json is missing beside the weights, and {model.family} cannot be used without it: save the "
            "processor into the same folder (transformers: AutoProcessor...save_pretrained)"
        )
    stages = {stage: {"steps": 0} for stage in ("pretrain", "anneal", "distill", "bpo")}
    task = "boards" if processor is None else "records"
    name = f"converted-{model.family}-{model.size}"
    return Recipe.model_validate({"name": name, "model": model, "data": {"task": task}, **stages})


def to_huggingface(
    checkpoint: Path | str,
    model: ModelConfig,
    like: Path | str,
    target: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a checkpoint as transformers and vLLM read it.

    Args:
        checkpoint: a ``step_*`` folder that any layout wrote.
        model: the ``model`` section of the recipe that it was trained with.
        like: a folder with the ``config.json`` of the same model, and the tokenizer and processor files to carry along.
        shard_bytes: of one safetensors file, about.

    Raises:
        ConversionError, CheckpointError: listing all that is wrong; or ``target`` cannot be written.
    """
    checkpoint, like, target = Path(checkpoint), Path(like), Path(target).resolve()
    module, shape = convert_module(model.family), resolve(model)
    config = read_json(like / CONFIG)
    if differing := differences(resolve(model_of(config, like / CONFIG)), shape):
        raise ConversionError(
            f"{like / CONFIG} is of another model than {checkpoint} ({'; '.join(differing)}): give the folder of the "
            "same model with --like"
        )
    rules = module.rules(shape)
    source = megatron.TorchDist(checkpoint, rules, on_progress)
    if source.dtype not in _NAMES:
        raise ConversionError(f"{checkpoint} holds {source.dtype}, which is neither float32 nor bfloat16")
    dtype = _NAMES[source.dtype]
    groups = [Group(rule.theirs, dtype, partial(_split, rule, source)) for rule in rules]
    groups += _unused_groups(like, module, config, shape, dtype)
    companions = {path.name: path.read_bytes() for path in files.companions(like)}
    companions[CONFIG] = _with_dtype(companions[CONFIG], config, source.dtype)
    stamp = [source.facts["files"], files.digests(files.companions(like)), shard_bytes, [g.names for g in groups]]
    record = _record("to-hf", model, stamp)
    if files.is_done(target, record):
        return
    shards = list(_cut(groups, lambda group: group.size, shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    with files.workplace(target, record, on_progress) as place:
        place.expect({name: sum(group.size for group in shard) for name, shard in zip(names, shards, strict=True)})
        for name, shard in zip(names, shards, strict=True):
            place.part(name, partial(write_safetensors, groups=shard))
        for name, data in companions.items():
            files.write_bytes(place.content / name, data)
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for group in shard for tensor in group.names
        }
        total = sum(group.size for shard in shards for group in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        place.publish({INDEX: index} if len(names) > 1 else None)


def read_recipe(path: Path) -> ModelConfig:
    """The ``model`` section of a resolved recipe.

    Raises:
        ConversionError: it is damaged.
    """
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConversionError(f"{path} cannot be read ({error}): copy the run folder again from its source") from error


def find_like(run: Path, model: ModelConfig, like: Path | None = None) -> Path:
    """The folder whose ``config.json`` an export takes: ``like``, or else the one that the run came from.

    Raises:
        ConversionError: none of them has one.
    """
    if like is not None:
        return like
    places = [run, *(Path(path) for path in (model.processor, model.init_from) if path is not None)]
    for place in places:
        if (place / CONFIG).is_file():
            return place
    tried = ", ".join(str(place) for place in places)
    raise ConversionError(
        f"no {CONFIG} in {tried}: give a folder of the same model with its configuration and tokenizer: --like DIR"
    )


def _split(rule: Rule, source: megatron.TorchDist) -> Iterator[Tensor]:
    yield from rule.split(source.read(rule)).values()


def _write_bytes(stream: Stream, data: bytes) -> None:
    stream.write(data)


def _unused_groups(like: Path, module: Any, config: Mapping[str, Any], shape: Any, dtype: str) -> list[Group]:
    """What the model does not use and the configuration describes: carried along, from ``like``, or filled."""
    problems: list[str] = []
    if (like / UNUSED).is_file():
        entries = {entry.name: entry for entry in read_header(like / UNUSED, problems)}
    else:
        entries, _ = open_weights(like, module.canonical)
    found = {name: entry for name, entry in entries.items() if module.is_unused(name, shape)}
    problems += [
        f"{name}: the type {entry.dtype} is not known" for name, entry in found.items() if entry.dtype not in BYTES
    ]
    groups = [copied(name, entry) for name, entry in sorted(found.items()) if entry.dtype in BYTES]
    for name, (dims, fill) in module.beyond(config, shape).items():
        if name in found and found[name].shape != dims:
            problems.append(f"{name}: expected {list(dims)}, found {list(found[name].shape)}")
        elif name not in found and fill is None:
            problems.append(f"{name}: missing")
        elif name not in found:
            groups.append(filled(name, dims, dtype, fill))
    if problems:
        raise ConversionError(
            f"{like / CONFIG} describes tensors that the model does not use and that are not in {like}, so they cannot "
            "be written; give the folder that the model came from with --like:\n"
            + "\n".join(f"  {x}" for x in problems)
        )
    return groups


def _with_dtype(raw: bytes, config: dict[str, Any], dtype: torch.dtype) -> bytes:
    """``config.json`` with the type of the weights; its very bytes where it says so already."""
    wanted = str(dtype).removeprefix("torch.")
    sections = [config, *(config[key] for key in ("text_config", "vision_config") if isinstance(config.get(key), dict))]
    changed = False
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            if section.get(key, wanted) != wanted:
                section[key], changed = wanted, True
    return (json.dumps(config, indent=2) + "\n").encode() if changed else raw


def _record(command: str, model: ModelConfig, made_of: Any) -> dict[str, Any]:
    about = model.model_dump(mode="json", include={"family", "size", "shape", "dtype"})
    return {"format": 1, "command": command, "model": about, "of": files.fingerprint(made_of)}


def _cut(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of at most ``limit`` bytes, or of one item."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
