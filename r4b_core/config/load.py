"""Read a recipe: defaults, the algorithm's preset, the file and the command line, each value with its origin."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

import r4b_core
from r4b_core.config.recipe import PRESETS, Recipe, Settings
from r4b_core.config.yaml_source import YamlProblem, parse_text, parse_value

KeyPath = tuple[str, ...]
SettingsT = TypeVar("SettingsT", bound=Settings)
DEFAULT = "default"
OVERRIDE = "command line"


class RecipeError(ValueError):
    """A recipe that cannot be run. ``problems`` holds every one found, each naming key, value, reason and way out."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{source}: {len(self.problems)} problems{listed}")


@dataclass(frozen=True)
class Resolved(Generic[SettingsT]):
    """A validated recipe and where each of its values came from.

    Attributes:
        recipe: the recipe, complete: `Recipe` for training, another schema for the data engine.
        origins: dotted key of every value -> "default", "preset grpo", "demo.yaml:12" or "command line".
        notes: dotted key -> the file's comment on it, where the value is the file's.
        source: the file that was read.
    """

    recipe: SettingsT
    origins: dict[str, str]
    notes: dict[str, str]
    source: Path

    def values(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value, in the order of the schema."""
        for path, value in _leaves(self.recipe.model_dump(mode="json"), type(self.recipe)):
            key = ".".join(path)
            yield key, value, self.origins[key]


ResolvedRecipe = Resolved[Recipe]


def builtin_recipes() -> dict[str, Path]:
    """The recipes that ship with r4b, by name: from the checkout, or from the installed package."""
    package = Path(r4b_core.__file__).parent
    checkout = package.parent / "recipes"
    folder = checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file that a command's RECIPE argument means: a path, or the name of a recipe that ships (``demo``).

    Raises:
        RecipeError: if there is neither; names the shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = builtin_recipes()
    if path in (Path(path.stem), Path("recipes", f"{path.stem}.yaml")) and path.stem in shipped:
        return shipped[path.stem]
    raise RecipeError(str(name), [f"no such file, nor a recipe that ships with r4b ({', '.join(shipped) or 'none'})"])


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Read a recipe, lay it over the defaults and the algorithm's preset, apply overrides and validate all of it.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: ``key=value`` with a dotted key and a YAML value, e.g. ``bpo.steps=10``.

    Raises:
        RecipeError: with every problem found.
    """
    return load_settings(find_recipe(path), overrides, Recipe, _presets)


def load_settings(
    path: Path,
    overrides: Sequence[str],
    schema: type[SettingsT],
    presets: Callable[[Callable[..., Any]], tuple[str, Mapping[str, Any]] | None] = lambda asked: None,
) -> Resolved[SettingsT]:
    """Read a YAML file of ``schema`` and lay it over the defaults; see `load_recipe`.

    Args:
        presets: is given a function of a key path that returns what was asked for there, and returns the name of the
            preset that this means and its values; they go over the defaults and under the file.

    Raises:
        RecipeError: with every problem found.
    """
    try:
        source = parse_text(path.read_text(encoding="utf-8"))
        given, lines = source.data, source.lines
    except YamlProblem as problem:
        raise RecipeError(f"{path.name}:{problem.line}", [problem.reason]) from problem
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), ["not UTF-8 text"]) from error
    if not isinstance(given, dict):
        raise RecipeError(str(path), [f"a recipe is a mapping of settings, this is {_kind(given)}"])

    problems: list[str] = []
    data = _Layers(schema)
    data.lay(_defaults(schema), lambda leaf: DEFAULT)
    asked = _parse_overrides(overrides, problems)
    preset = presets(lambda *key: asked.get(key, _get(given, *key) or _get(data.values, *key)))
    if preset is not None:
        name, values = preset
        data.lay(values, lambda leaf: f"preset {name}")
    data.lay(given, lambda leaf: f"{path.name}:{lines.get(leaf, 0)}")
    for key, value in asked.items():
        data.put(key, value, OVERRIDE)

    problems += data.problems
    recipe = None
    try:
        recipe = schema.model_validate(data.values)
    except ValidationError as error:
        problems += _describe(error, data)
    if problems or recipe is None:
        raise RecipeError(path.name, problems)
    origins = {".".join(leaf): data.origin(leaf) for leaf, _ in _leaves(recipe.model_dump(mode="json"), schema)}
    return Resolved(recipe, origins, _notes(source.notes, origins, path), path)


def _notes(given: Mapping[KeyPath, str], origins: Mapping[str, str], path: Path) -> dict[str, str]:
    """The file's comment on each value that is the file's: its own, or that of the section which it stands in."""
    notes = {}
    for key, origin in origins.items():
        parts = tuple(key.split("."))
        above = (given[parts[:depth]] for depth in range(len(parts), 0, -1) if parts[:depth] in given)
        if origin.startswith(f"{path.name}:") and (note := next(above, "")):
            notes[key] = note
    return notes


def _presets(asked: Callable[..., Any]) -> tuple[str, Mapping[str, Any]] | None:
    algorithm = asked("bpo", "algorithm")
    known = isinstance(algorithm, str) and algorithm in PRESETS
    return (algorithm, {"bpo": PRESETS[algorithm]}) if known else None


def dump_resolved(resolved: Settings | Resolved[Any]) -> str:
    """The complete recipe as YAML: a recipe in its own right that loads to the same values."""
    recipe = resolved.recipe if isinstance(resolved, Resolved) else resolved
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def fingerprint(section: BaseModel | Mapping[str, Any]) -> str:
    """16 hex digits that change when any value of a recipe or of one of its sections changes."""
    data = section.model_dump(mode="json") if isinstance(section, BaseModel) else dict(section)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class _Layers:
    """Values laid over one another, with the origin of each and the problems met on the way."""

    def __init__(self, schema: type[Settings]) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[str] = []

    def lay(self, tree: Mapping[str, Any], origin_of: Callable[[KeyPath], str]) -> None:
        for leaf, value in _leaves(tree, self.schema):
            self.put(leaf, value, origin_of(leaf))

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        section: type[BaseModel] | None = self.schema
        where = self.values
        for depth, name in enumerate(path):
            last = depth == len(path) - 1
            field = section.model_fields.get(name) if section else None
            if section and field is None:
                self.problems.append(f"{_at(path, origin)}: unknown key{_suggest(path[: depth + 1], self.schema)}")
                return
            below = _section(field.annotation) if field else None
            if last and below and not isinstance(value, dict):
                given = "empty" if value is None else f"set to {_show(value)}"
                self.problems.append(f"{_at(path, origin)}: is {given}, but is a section of {_names(below)}")
                return
            if last and field and isinstance(value, bool) and not _takes_bool(field.annotation):
                self.problems.append(
                    f"{_at(path, origin)} = {str(value).lower()}: true and false are for switches, this is not one"
                )
                return
            if last:
                where[name] = value
                break
            if field and below is None and not isinstance(where.get(name), dict):
                self.problems.append(f"{_at(path, origin)}: unknown key; {'.'.join(path[: depth + 1])} holds one value")
                return
            where = where.setdefault(name, {})
            section = below
        self.origins[path] = origin

    def origin(self, leaf: KeyPath) -> str:
        """The origin of a value: its own, or the last one that changed a part of it."""
        parts = [origin for path, origin in self.origins.items() if path[: len(leaf)] == leaf]
        return parts[-1] if parts else DEFAULT


def _defaults(schema: type[Settings]) -> dict[str, Any]:
    """Every default of the schema as plain data; ``name`` has none."""
    data = schema.model_validate({"name": "-"}).model_dump(mode="json")
    del data["name"]
    return data


def _leaves(
    tree: Mapping[str, Any], schema: type[BaseModel] | None, path: KeyPath = ()
) -> Iterator[tuple[KeyPath, Any]]:
    """Every value below a tree; a free-form mapping (``anneal.mix``) is one value, and so is what the schema lacks."""
    for name, value in tree.items():
        field = schema.model_fields.get(name) if schema else None
        below = _section(field.annotation) if field else None
        if below and isinstance(value, Mapping):
            yield from _leaves(value, below, (*path, name))
        else:
            yield (*path, name), value


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _takes_bool(annotation: Any) -> bool:
    if annotation in (int, float, str):
        return False
    if get_origin(annotation) in (Union, UnionType):
        return any(_takes_bool(option) for option in get_args(annotation))
    return True


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[KeyPath, Any]:
    asked: dict[KeyPath, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            problems.append(f"{text!r} on the command line: an override is KEY=VALUE, such as bpo.steps=10")
            continue
        try:
            asked[tuple(key.strip().split("."))] = parse_value(value)
        except YamlProblem as problem:
            problems.append(f"{key} = {value!r} on the command line: {problem.reason}")
    return asked


def _describe(error: ValidationError, data: _Layers) -> list[str]:
    """pydantic's errors in the words of a recipe."""
    problems = []
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"])
        origin = data.origin(path[:-1] if path not in data.origins and path[:-1] in data.origins else path)
        if item["type"] == "missing":
            problems.append(f"{'.'.join(path)}: is required and not set")
        elif path and _section_at(path, data.schema) is None:
            reason = item["msg"].removeprefix("Value error, ")
            problems.append(f"{_at(path, origin)} = {_show(item['input'])}: {reason[0].lower()}{reason[1:]}")
        else:
            problems.append(f"{'.'.join(path) or 'recipe'}: {item['msg'].removeprefix('Value error, ')}")
    return problems


def _section_at(path: KeyPath, schema: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = schema
    for name in path:
        field = section.model_fields.get(name) if section else None
        section = _section(field.annotation) if field else None
    return section


def _suggest(path: KeyPath, schema: type[BaseModel]) -> str:
    """The nearest valid key: a sibling, else the same name in another section, else the most similar key."""
    leaf, parents = path[-1], path[:-1]
    keys = _all_keys(schema)
    siblings = [key for key in keys if key[:-1] == parents]
    if near := difflib.get_close_matches(leaf, [key[-1] for key in siblings], n=1, cutoff=0.7):
        return f"; did you mean {'.'.join((*parents, near[0]))}?"
    same_name = [key for key in keys if key[-1] == leaf]
    same_name.sort(key=lambda key: -len([None for a, b in zip(key, path, strict=False) if a == b]))
    if same_name:
        return f"; did you mean {'.'.join(same_name[0])}?"
    if near := difflib.get_close_matches(leaf, [key[-1] for key in keys], n=1, cutoff=0.75):
        return f"; did you mean {'.'.join(next(key for key in keys if key[-1] == near[0]))}?"
    return f"; {'.'.join(parents) or 'a recipe'} holds {', '.join(key[-1] for key in siblings)}"


def _all_keys(schema: type[BaseModel], path: KeyPath = ()) -> list[KeyPath]:
    keys: list[KeyPath] = []
    for name, field in schema.model_fields.items():
        keys.append((*path, name))
        if below := _section(field.annotation):
            keys += _all_keys(below, (*path, name))
    return keys


def _names(schema: type[BaseModel]) -> str:
    return ", ".join(schema.model_fields)


def _at(path: KeyPath, origin: str) -> str:
    """``bpo.steps`` with its place: ``bpo.steps (line 12)``; the file's name leads the whole message."""
    where = origin.rpartition(":")[2]
    if origin == OVERRIDE:
        return f"{'.'.join(path)} (command line)"
    return f"{'.'.join(path)} (line {where})" if where.isdigit() else ".".join(path)


def _get(tree: Any, *path: str) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
