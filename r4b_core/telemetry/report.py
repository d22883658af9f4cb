"""report.html: one self-contained page per run. It opens from a disk, loads nothing, and escapes whatever it quotes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from r4b_core.modes import Mode
from r4b_core.telemetry.environment import now
from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.hero import hero_figure
from r4b_core.telemetry.metrics import read_metrics
from r4b_core.telemetry.panels import (
    hero_section,
    learning_section,
    loss_section,
    summary_rows,
    summary_section,
    time_section,
)
from r4b_core.telemetry.run import ENVIRONMENT, METRICS, RECIPE, SUMMARY
from r4b_core.telemetry.viewer import collect_groups

__all__ = ["hero_figure", "write_report"]

REPORT = "report.html"
ALARM_LIMIT = 12
TILE_LIMIT = 6
MAX_NAME = 200


def write_report(run_path: str | Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Whatever the folder does not hold yet is left out with a sentence; a damaged file is named on the page.

    Raises:
        ValueError: the folder does not exist.
    """
    run = Path(run_path)
    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder: give the folder that holds {METRICS}")
    problems: list[str] = []
    recipe = _load(run / RECIPE, yaml.safe_load, problems)
    environment = _load(run / ENVIRONMENT, json.loads, problems)
    summary = _load(run / SUMMARY, json.loads, problems)
    summary = _checked_summary(summary, problems)
    if _part(recipe, "bpo").get("steps") == 0:
        summary.pop("after_bpo")  # nothing came between: one evaluation, not two
    try:
        records = read_metrics(run / METRICS)
    except ValueError as error:
        problems.append(str(error))
        records = []
    sections = [
        hero_section(records),
        summary_section(summary),
        learning_section(records),
        loss_section(records),
        time_section(records, summary),
    ]
    viewer = collect_groups(run)
    panels = [panel for section in sections for panel in section.panels]
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=_name(recipe, run),
            facts=_facts(recipe, environment, summary, records),
            problems=problems,
            alarms=_alarms(records),
            alarm_limit=ALARM_LIMIT,
            tiles=_tiles(summary),
            rows=_table(summary),
            sections=_numbered(sections),
            viewer=viewer,
            provenance=_provenance(environment),
            data=Markup(
                script_json({"panels": [dataclasses.asdict(panel) for panel in panels], "steps": viewer.steps})
            ),
            plotly=Markup(get_plotlyjs()),
        )
    )
    path = run / REPORT
    write_atomic(path, page)
    return path


def script_json(value: Any) -> str:
    """JSON that cannot end the ``<script>`` it stands in, whatever strings it carries."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate (a token cut in half) cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("r4b_core.telemetry", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _load(path: Path, parse: Any, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} could not be read: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a mapping and was left out.")
        return {}
    return value


def _checked_summary(summary: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The summary without sides that are not {family: {mode: {metric: number or null}}}; NaN becomes null."""
    checked = dict(summary)
    for when in ("before_bpo", "after_bpo"):
        side = summary.get(when) or {}
        try:
            checked[when] = {
                family: {mode: {name: _finite(value) for name, value in cell.items()} for mode, cell in modes.items()}
                for family, modes in side.items()
            }
        except (AttributeError, TypeError):
            problems.append(f"{SUMMARY}: {when} is not a mapping of family, mode and metric; it was left out.")
            checked[when] = {}
    return checked


def _finite(value: float | None) -> float | None:
    """None for None and NaN. TypeError: not a number."""
    return value if value is not None and math.isfinite(value) else None


def _part(whole: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, {} where it is absent or no mapping."""
    part = whole.get(name)
    return part if isinstance(part, dict) else {}


def _name(recipe: Mapping[str, Any], run: Path) -> str:
    return str(recipe.get("name") or run.name)[:MAX_NAME]


def _facts(
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str]]:
    versions = _part(environment, "versions")
    hardware = _part(environment, "hardware")
    bpo = _part(recipe, "bpo")
    facts: list[tuple[str, str]] = []
    if environment.get("date"):
        resumes = len(environment.get("resumes") or [])
        facts.append(("started", str(environment["date"]) + (f", resumed {resumes} ×" if resumes else "")))
    if "seed" in recipe:
        facts.append(("seed", str(recipe["seed"])))
    if bpo:
        done = max((r["step"] for r in records if r["stage"] == "bpo"), default=0)
        facts.append(("algorithm", f"{bpo.get('algorithm', 'bpo')}, {done} of {bpo.get('steps', '?')} steps"))
    model = _part(recipe, "model")
    if model:
        facts.append(("model", f"{model.get('family', '?')}, {model.get('size', '?')}"))
    if hardware:
        gpus = hardware.get("gpus") or []
        processor = f"{len(gpus)} × {gpus[0]}" if gpus else f"{hardware.get('cpu')}, {hardware.get('cores')} cores"
        facts.append(("hardware", f"{processor}, {hardware.get('memory_gb')} GB"))
    timed = [(stage, value) for stage, value in _part(summary, "seconds").items() if isinstance(value, (int, float))]
    if timed:
        facts.append(("wall time", ", ".join(f"{stage} {value:.0f} s" for stage, value in timed)))
    shown = [(name, versions[name]) for name in ("r4b", "torch", "megatron-core", "python") if versions.get(name)]
    if shown:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in shown)))
    if environment.get("commit"):
        commit, _, changes = str(environment["commit"]).partition("+")
        facts.append(("commit", commit[:10] + (f" (+{changes})" if changes else "")))
    return facts


def _alarms(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"stage": record["stage"], "step": record["step"], "message": str(value)}
        for record in records
        for name, value in record.items()
        if name.startswith("alarm/")
    ]


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    tiles = []
    for row in summary_rows(summary):
        if row["mode"] != Mode.AUTO:
            continue
        before, after = row["before_bpo"], row["after_bpo"]
        specs = (
            ("accuracy", "accuracy", True),
            ("thinks on", "thinking_rate", True),
            ("mean tokens", "mean_tokens", False),
        )
        figures = []
        for label, key, percent in specs:
            old, new = before.get(key), after.get(key)
            if new is None:
                old, new = None, old
            figures.append((label, None if old is None else _figure(old, percent), _figure(new, percent)))
        tiles.append({"family": "all" if row["family"] == "overall" else row["family"], "figures": figures})
    return tiles[:TILE_LIMIT]


def _table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    family = None
    for row in summary_rows(summary):
        cells = [
            _figure(row[when].get(key), percent)
            for when in ("before_bpo", "after_bpo")
            for key, percent in (("accuracy", True), ("mean_tokens", False), ("thinking_rate", True))
        ]
        rows.append({"family": row["family"], "mode": row["mode"], "cells": cells, "first": row["family"] != family})
        family = row["family"]
    return rows


def _figure(value: float | None, percent: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if percent else f"{value:.1f}"


def _numbered(sections: Sequence[Any]) -> list[dict[str, Any]]:
    """The sections as the template wants them: every panel with its number in the page's data."""
    number = 0
    made = []
    for section in sections:
        panels = []
        for panel in section.panels:
            panels.append(
                {"title": panel.title, "note": panel.note, "wide": panel.wide, "tall": panel.tall, "number": number}
            )
            number += 1
        made.append(
            {
                "id": section.id,
                "title": section.title,
                "lead": section.lead,
                "missing": section.missing,
                "panels": panels,
            }
        )
    return made


def _provenance(environment: Mapping[str, Any]) -> str:
    versions = _part(environment, "versions")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    system = _part(environment, "hardware").get("system")
    parts = [f"Report written {now()}", f"run on {system}" if system else "", listed]
    return "; ".join(part for part in parts if part) + "."
