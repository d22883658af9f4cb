"""`r4b show`: a recipe with every value and where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r4b_core.cli.arguments import Overrides, RecipeName

if TYPE_CHECKING:
    from r4b_core.config.load import Resolved

Changed = Annotated[bool, typer.Option("--changed", help="Leave out the defaults.")]
AsYaml = Annotated[bool, typer.Option("--yaml", help="Print the complete recipe as YAML.")]


def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    changed: Changed = False,
    as_yaml: AsYaml = False,
) -> None:
    """Show the complete recipe and where each value came from."""
    from r4b_core.config.load import load_recipe

    print_recipe(load_recipe(recipe, overrides or ()), changed, as_yaml)


def print_recipe(resolved: Resolved[Any], changed: bool, as_yaml: bool) -> None:
    """A recipe as a table of setting, value, origin and the file's reason; or as YAML."""
    from rich.markup import escape
    from rich.table import Table

    from r4b_core.cli.output import console, say
    from r4b_core.config.load import DEFAULT, dump_resolved

    if as_yaml:
        say(dump_resolved(resolved).rstrip())
        return
    table = Table(title=str(resolved.source), title_justify="left", box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("origin", no_wrap=True)
    if resolved.notes:
        table.add_column("why", overflow="fold")
    section = ""
    for key, value, origin in resolved.values():
        if changed and origin == DEFAULT:
            continue
        if key.partition(".")[0] != section and section:
            table.add_section()
        section = key.partition(".")[0]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        row = [key, text, origin, *([resolved.notes.get(key, "")] if resolved.notes else [])]
        table.add_row(*map(escape, row), style="dim" if origin == DEFAULT else "bold")
    console().print(table)
