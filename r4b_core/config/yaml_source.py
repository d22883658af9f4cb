"""Recipes as YAML text: safe, with the line of every key, no duplicate keys and YAML 1.2's plain scalars.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false and ``1:30`` is 90. Recipes are read by the core
schema of YAML 1.2 instead: ``true``/``false``, decimal integers and floats as Python writes them; the rest is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class YamlProblem(Exception):
    """What is wrong with a YAML text and on which line (from 1; 0 where unknown)."""

    reason: str
    line: int = 0


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
    return parse_mapping_or_value(text)[0]


def parse_mapping_or_value(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The data of a YAML text and the line (from 1) of every mapping key, by key path.

    Raises:
        YamlProblem: if the text is not YAML, has a duplicate or non-text key, or a tag that builds objects.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[tuple[str, ...], int] = {}
        _note_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(error.problem or "not YAML", mark.line + 1 if mark else 0) from error
    except yaml.YAMLError as error:
        raise YamlProblem(str(error)) from error
    finally:
        loader.dispose()


def _note_lines(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise YamlProblem(f"{'.'.join((*path, str(key.value)))}: a key must be plain text", line)
        below = (*path, key.value)
        if below in lines:
            raise YamlProblem(f"{'.'.join(below)}: set twice, first on line {lines[below]}", line)
        lines[below] = line
        _note_lines(value, below, lines)
