"""Recipes as YAML text: safe, with the line of every key, no duplicate keys and YAML 1.2's plain scalars.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false and ``1:30`` is 90. Recipes are read by the core
schema of YAML 1.2 instead: ``true``/``false``, decimal integers and floats as Python writes them; the rest is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import yaml


@dataclass(frozen=True)
class YamlProblem(Exception):
    """What is wrong with a YAML text and on which line (from 1; 0 where unknown)."""

    reason: str
    line: int = 0


@dataclass(frozen=True)
class YamlText:
    """What a YAML text says and where.

    Attributes:
        data: the value of the document.
        lines: the line (from 1) of every mapping key, by key path.
        notes: the comment after a key's value (after the key of a value that stands below it), with the comment lines
            below it that begin in the same column.
    """

    data: Any
    lines: dict[tuple[str, ...], int]
    notes: dict[tuple[str, ...], str]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Aliases are refused: a recipe has no need of them, and nested ones can fill any memory."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise YamlProblem(
                f"*{event.anchor}: aliases are not allowed, write the values out", event.start_mark.line + 1
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), ["t", "f"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def parse_value(text: str) -> Any:
    """The value of a command-line override: one YAML scalar, list or mapping.

    Raises:
        YamlProblem: if the text is not YAML.
    """
    return parse_text(text).data


def parse_text(text: str) -> YamlText:
    """Read one YAML document.

    Raises:
        YamlProblem: if the text is not YAML, has a duplicate or non-text key, or a tag that builds objects.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlText(None, {}, {})
        found = YamlText(None, {}, {})
        _find_keys(node, (), text.splitlines(), found)
        return replace(found, data=loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(error.problem or "not YAML", mark.line + 1 if mark else 0) from error
    except yaml.YAMLError as error:
        raise YamlProblem(str(error)) from error
    finally:
        loader.dispose()


def _find_keys(node: yaml.Node, path: tuple[str, ...], source: list[str], found: YamlText) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise YamlProblem(f"{'.'.join((*path, str(key.value)))}: a key must be plain text", line)
        below = (*path, key.value)
        if below in found.lines:
            raise YamlProblem(f"{'.'.join(below)}: set twice, first on line {found.lines[below]}", line)
        found.lines[below] = line
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        if note := _comment(source, key.end_mark if is_block else value.end_mark):
            found.notes[below] = note
        _find_keys(value, below, source, found)


def _comment(source: list[str], end: yaml.Mark) -> str:
    """The comment that begins after ``end`` on its line, and goes on below in the same column."""
    if end.line >= len(source):
        return ""
    first = re.match(r"[\s:,\]}]*#(.*)", source[end.line][end.column :])
    if first is None or not source[end.line][: end.column].strip():
        return ""
    column = end.column + source[end.line][end.column :].index("#")
    parts = [first[1]]
    for line in source[end.line + 1 :]:
        if line[:column].strip() or not line.startswith("#", column):
            break
        parts.append(line[column + 1 :])
    return " ".join(part.strip() for part in parts)
