"""A Hugging Face checkpoint folder: its ``config.json``, and its safetensors, read tensor by tensor.

Nothing of it is run or unpickled. The shapes and types of all tensors come from the files' headers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r4b_core.config.recipe import ModelConfig
from r4b_core.models.convert.rules import Rule, Shape
from r4b_core.models.convert.settings import ConversionError, Settings
from r4b_core.models.families import resolve

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
FAMILIES = ("r4b", "qwen3_vl")
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
# Bytes of a value, by type; what the model does not use may be of any of them.
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
BYTES |= {"I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``name`` is the one it has in ``file``."""

    file: Path
    name: str
    shape: Shape
    dtype: str

    def read(self) -> Tensor:
        """
        Raises:
            ConversionError: the file is not any more what it was when its header was read.
        """
        try:
            # Opened for each tensor, so that no pages of the file stay in memory.
            with safe_open(self.file, "pt") as file:
                value = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{self.file} was changed while it was read ({error}): start again") from error
        if tuple(value.shape) != self.shape:
            raise ConversionError(f"{self.file} was changed while it was read: start again")
        return value

    def rows(self, start: int, stop: int) -> Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[start:stop]


def convert_module(family: str) -> ModuleType:
    """The family's table of names."""
    return import_module(f"r4b_core.models.{family}.convert")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConversionError: the file is missing, unreadable or no JSON table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing: give the folder of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read ({error}): copy it again from its source") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} is not a JSON table: copy it again from its source")
    return value


def read_config(folder: Path | str) -> ModelConfig:
    """The ``model`` section of a recipe for a Hugging Face checkpoint; its processor is the folder itself.

    The type is that of most weights where the folder has any, else what ``config.json`` says.

    Raises:
        ConversionError: it is no checkpoint of a known family, or of one with features that the model does not have.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    model = model_of(values, folder / CONFIG)
    weights, _ = open_weights(folder, convert_module(model.family).canonical)
    dtype = DTYPES.get(_common_dtype([entry.dtype for entry in weights.values()]), model.dtype)
    return model.model_copy(update={"dtype": dtype, "processor": str(folder.resolve())})


def model_of(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """Family, size and shape of a ``config.json``.

    Raises:
        ConversionError: see :func:`read_config`.
    """
    modules = {family: convert_module(family) for family in FAMILIES}
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = next((family for family, module in modules.items() if name in module.ARCHITECTURES), None)
    if family is None:
        known = ", ".join(name for module in modules.values() for name in module.ARCHITECTURES)
        raise ConversionError(f"{path}: architectures = {names!r} is not one that can be converted; there are {known}")
    settings = Settings(values)
    shape = modules[family].read_shape(settings)
    if settings.problems:
        raise ConversionError(
            f"{path} describes a model that cannot be built here:\n" + "\n".join(f"  {x}" for x in settings.problems)
        )
    dtype = values.get("dtype", values.get("torch_dtype"))
    model = ModelConfig(
        family=family, **nearest_size(family, shape), dtype=dtype if dtype in DTYPES.values() else "bfloat16"
    )
    try:
        resolve(model)
    except ValueError as error:
        raise ConversionError(f"{path} describes a model that cannot be built here: {error}") from error
    return model


def nearest_size(family: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """``size`` and ``shape`` of a recipe: the named size with the fewest fields that differ, and those fields."""

    def differing(size: str) -> dict[str, Any]:
        named = dataclasses.asdict(convert_module(family).SIZES[size])
        return {key: value for key, value in shape.items() if as_lists(named[key]) != value}

    size = min(convert_module(family).SIZES, key=lambda size: len(differing(size)))
    return {"size": size, "shape": differing(size)}


def differences(found: Any, wanted: Any) -> list[str]:
    """The fields in which two shapes differ, but for how a new model's weights are drawn."""
    if type(found) is not type(wanted):
        return [f"{type(found).__name__} instead of {type(wanted).__name__}"]
    pairs = dataclasses.asdict(found), dataclasses.asdict(wanted)
    return [
        f"{name} = {as_lists(value)} instead of {as_lists(pairs[1][name])}"
        for name, value in pairs[0].items()
        if name != "init_std" and as_lists(value) != as_lists(pairs[1][name])
    ]


def as_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def open_weights(folder: Path, canonical: Callable[[str], str]) -> tuple[dict[str, Entry], list[str]]:
    """All tensors of a folder by canonical name, from the files' headers; and what is wrong with the files."""
    problems: list[str] = []
    listed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX, problems)
        files = sorted(set(listed.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        files = []
        problems.append(_no_weights(folder))
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in read_header(folder / file, problems):
            if entry.name in listed and listed[entry.name] != file:
                problems.append(f"{entry.name}: the index says {listed[entry.name]}, and {file} holds it too")
                continue
            name = canonical(entry.name)
            if name in entries:
                before = entries[name]
                problems.append(f"{name}: twice, as {before.name} in {before.file.name} and {entry.name} in {file}")
            entries[name] = entry
    readable = {entry.file.name for entry in entries.values()}
    held = {entry.name for entry in entries.values()}
    problems += [
        f"{name}: the index says {file}, which does not hold it"
        for name, file in listed.items()
        if file in readable and name not in held
    ]
    return entries, problems


def _weight_map(path: Path, problems: list[str]) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        problems.append(f"{path.name}: weight_map is not a table of file names")
        return {}
    strange = sorted({file for file in found.values() if Path(file).name != file or file in ("", ".", "..")})
    problems += [f"{path.name}: {file!r} is not a plain file name of the folder" for file in strange]
    return {name: file for name, file in found.items() if file not in strange}


def read_header(path: Path, problems: list[str]) -> Iterable[Entry]:
    if not path.is_file():
        problems.append(f"{path.name}: the index names this file, and it is missing")
        return
    if path.suffix in _PICKLES:
        problems.append(f"{path.name}: {_pickle_reason(path.name)}")
        return
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                yield Entry(path, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        problems.append(f"{path.name}: {size} bytes, truncated or not a safetensors file ({error})")


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{INDEX} is missing, and without it nobody can tell whether {', '.join(shards)} are all"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return f"{', '.join(pickles)}: {_pickle_reason(pickles[0])}"
    return f"neither {SINGLE} nor {INDEX} is there"


def _pickle_reason(name: str) -> str:
    return (
        f"refused, since a {Path(name).suffix} file is a pickle, which can run code when it is read; save the model "
        "as safetensors (transformers: save_pretrained)"
    )


@dataclass(frozen=True)
class Source:
    """A folder whose tensors were checked against a family's table; ``unused`` are those the model does not need."""

    folder: Path
    rules: list[Rule]
    entries: dict[str, Entry]
    unused: dict[str, Entry]
    dtype: str

    def read(self, name: str) -> Tensor:
        return self.entries[name].read()


def open_checkpoint(folder: Path | str) -> tuple[ModelConfig, Source]:
    """A checkpoint whose every tensor is there, in shape and type, and nothing else.

    Raises:
        ConversionError: listing every file and tensor that is wrong.
    """
    folder = Path(folder)
    model = read_config(folder)
    module, shape = convert_module(model.family), resolve(model)
    source = check_tensors(
        folder,
        module.rules(shape),
        module.canonical,
        lambda name: module.is_unused(name, shape),
        {"lm_head.weight": "model.language_model.embed_tokens.weight"} if shape.tie_embeddings else {},
    )
    return model.model_copy(update={"dtype": source.dtype}), source


def check_tensors(
    folder: Path,
    rules: list[Rule],
    canonical: Callable[[str], str],
    is_unused: Callable[[str], bool],
    copies: Mapping[str, str],
) -> Source:
    """The tensors of ``folder`` against ``rules``; ``copies`` may be there and must then equal what they copy.

    Raises:
        ConversionError: listing every file and tensor that is wrong.
    """
    entries, problems = open_weights(folder, canonical)
    expected = {name: shape for rule in rules for name, shape in rule.theirs.items()}
    unused = {name: entry for name, entry in entries.items() if name not in expected and is_unused(name)}
    dtype = _common_dtype([entries[name].dtype for name in expected if name in entries])
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing, expected {list(shape)}")
        elif entry.shape != shape:
            problems.append(f"{name}: expected {list(shape)}, found {list(entry.shape)}")
        elif entry.dtype != dtype:
            problems.append(f"{name}: expected the type {dtype} of most tensors, found {entry.dtype}")
        elif entry.dtype not in DTYPES:
            problems.append(f"{name}: the type {entry.dtype} is neither F32 nor BF16; save it as one of them")
    problems += [
        f"{name}: the type {entry.dtype} is not known" for name, entry in unused.items() if entry.dtype not in BYTES
    ]
    for name, entry in entries.items():
        if name in expected or name in unused:
            continue
        original = entries.get(copies.get(name, ""))
        if original is None:
            problems.append(f"{name}: extra, {list(entry.shape)}")
        elif not _equal(entry, original):
            problems.append(f"{name}: differs from {copies[name]}, and the configuration says that they are one")
    if problems:
        raise ConversionError(
            f"{folder} does not hold the tensors that its {CONFIG} describes ({len(problems)} problems):\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return Source(folder, rules, {name: entries[name] for name in expected}, unused, DTYPES[dtype])


def _common_dtype(dtypes: list[str]) -> str:
    return max(sorted(set(dtypes)), key=dtypes.count, default="")


def _equal(one: Entry, other: Entry) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype not in DTYPES or len(one.shape) != 2:
        return False
    # Bit by bit, so that a value that is not a number equals itself.
    return all(
        torch.equal(*(x.rows(start, start + _COMPARED_ROWS).view(torch.uint8) for x in (one, other)))
        for start in range(0, one.shape[0], _COMPARED_ROWS)
    )
