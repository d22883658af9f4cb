"""The report's plots as plain data: what to draw, in which named colour. The page's script turns them into plots.

Colours are names (``thinking``, ``direct``, ``difficulty-0``, ``phase-rollout``), resolved by the style sheet, so that
one thing has one colour everywhere and the page can follow the reader's light or dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from r4b_core.modes import Mode
from r4b_core.telemetry.timeline import PHASES

Record = Mapping[str, Any]
MAX_POINTS = 600
MAX_BARS = 50
NEGLIGIBLE = 0.002
OUTLIER = 3.0
LOG_RANGE = 20.0
DIFFICULTY_COLORS = 6
DIFFICULTY_ORDER = ("overall", "easy", "direct", "mid", "medium", "hard")
DASHES = ("dot", "dashdot", "dash", "solid", "longdash", "longdashdot")
LOSSES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "kl": "KL to the annealed model",
    "distill/divergence": "divergence from the teacher",
    "data/fill": "fill of packed sequences",
}
FREE_BY_DIFFICULTY = "thinking_rate/free/difficulty/"
PROBABILITY_BY_DIFFICULTY = "decision/probability/free/difficulty/"


@dataclass
class Series:
    """One line or one set of bars. ``color`` is one name, or one per bar."""

    name: str
    x: list[Any]
    y: list[float | None]
    color: str | list[str]
    dash: str = "solid"
    markers: bool = False
    faint: bool = False
    hatched: bool = False


@dataclass
class Panel:
    """One plot. ``kind``: lines, bars (side by side), stack (over steps), rows (stacked, lying).

    ``cut``: where the y axis ends although some bars are higher. ``log``: a logarithmic y axis.
    """

    title: str
    kind: Literal["lines", "bars", "stack", "rows"]
    series: list[Series]
    x_title: str = ""
    y_title: str = ""
    note: str = ""
    percent: bool = False
    wide: bool = False
    tall: bool = False
    cut: float | None = None
    log: bool = False


@dataclass
class Section:
    """A chapter of the report; without panels, ``missing`` says in a sentence why."""

    id: str
    title: str
    lead: str
    missing: str = ""
    panels: list[Panel] = field(default_factory=list)


def series_of(records: Iterable[Record], stage: str, name: str) -> tuple[list[int], list[float | None]]:
    """(steps, values) of one metric of one stage; non-finite values are None, which a plot shows as a gap."""
    points: dict[int, float | None] = {}
    for record in records:
        value = record.get(name)
        if record["stage"] == stage and isinstance(value, (int, float)):
            points[record["step"]] = float(value) if math.isfinite(value) else None
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def by_difficulty(
    records: Sequence[Record], prefix: str = FREE_BY_DIFFICULTY
) -> dict[str, tuple[list[int], list[float | None]]]:
    """{difficulty: (BPO steps, values)} of the probes, from easy to hard."""
    names = {
        key.removeprefix(prefix)
        for record in records
        if record["stage"] == "bpo"
        for key in record
        if key.startswith(prefix)
    }
    rank = {name: index for index, name in enumerate(DIFFICULTY_ORDER)}
    order = sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
    return {name: series_of(records, "bpo", prefix + name) for name in order}


def difficulty_color(name: str, names: Sequence[str]) -> int:
    """Index of a difficulty's colour: fixed for the usual names, by position for others."""
    fixed = {"easy": 0, "direct": 1, "mid": 2, "medium": 2, "hard": 3}
    return fixed.get(name, (4 + list(names).index(name)) % DIFFICULTY_COLORS)


def hero_section(records: Sequence[Record]) -> Section:
    section = Section(
        "deciding",
        "Deciding when to think",
        "What the model does when nobody tells it whether to think: free probes during reinforcement learning.",
        missing="No free probes: the run has no BPO steps yet, or bpo.probe_every is 0.",
    )
    specs = (
        ("Thinking rate of free answers", FREE_BY_DIFFICULTY, "share of answers that think"),
        ("Probability of thinking at the decision", PROBABILITY_BY_DIFFICULTY, "mean p(think)"),
    )
    for title, prefix, label in specs:
        found = by_difficulty(records, prefix)
        lines = []
        for name, (x, y) in found.items():
            index = difficulty_color(name, list(found))
            x, y = thin(x, y)
            lines.append(
                Series(name, x, y, f"difficulty-{index}", dash=DASHES[index % len(DASHES)], markers=len(x) <= 60)
            )
        if lines:
            note = (
                "By difficulty of the question."
                if prefix == FREE_BY_DIFFICULTY
                else ("A greedy rate jumps when this crosses one half; the probability shows it coming.")
            )
            section.panels.append(Panel(title, "lines", lines, "BPO step", label, note, percent=True, tall=True))
    return section


def summary_section(summary: Mapping[str, Any] | None) -> Section:
    section = Section(
        "effect",
        "What BPO changed",
        "Held-out questions, each asked in both forced modes and in auto mode, before (hatched) and after (solid) BPO.",
        missing="No evaluation yet: the run has no summary.json with before_bpo and after_bpo.",
    )
    if not summary:
        return section
    specs = (
        ("Accuracy", "accuracy", "share right", True),
        ("Length of the answer", "mean_tokens", "mean tokens", False),
    )
    for title, key, label, percent in specs:
        bars = []
        for when, name in (("before_bpo", "before BPO"), ("after_bpo", "after BPO")):
            rows = [row for row in summary_rows(summary) if row[when].get(key) is not None]
            if rows:
                x = [[row["family"] for row in rows], [row["mode"] for row in rows]]
                y = [row[when][key] for row in rows]
                bars.append(Series(name, x, y, [row["mode"] for row in rows], hatched=when == "before_bpo"))
        if bars:
            section.panels.append(Panel(title, "bars", bars, "", label, percent=percent))
    return section


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per family and mode: {"family", "mode", "before_bpo": {...}, "after_bpo": {...}}, easy families first."""
    before, after = (summary.get(name) or {} for name in ("before_bpo", "after_bpo"))
    families = sorted({*before, *after}, key=lambda f: (DIFFICULTY_ORDER.index(f) if f in DIFFICULTY_ORDER else 99, f))
    rows = []
    for family in families:
        for mode in (Mode.DIRECT, Mode.THINKING, Mode.AUTO):
            cells = {
                when: (side.get(family) or {}).get(mode) or {}
                for when, side in (("before_bpo", before), ("after_bpo", after))
            }
            if any(cells.values()):
                rows.append({"family": family, "mode": str(mode)} | cells)
    return rows


def learning_section(records: Sequence[Record]) -> Section:
    section = Section(
        "modes",
        "The two modes while learning",
        "From the training rollouts of each BPO step. Faint: single steps; strong: their running mean.",
        missing="No BPO steps yet.",
    )
    specs: tuple[tuple[str, str, bool, dict[str, str]], ...] = (
        ("Reward", "mean reward", False, {"reward/thinking": "thinking", "reward/direct": "direct"}),
        ("Length", "mean tokens", False, {f"response_length/{m}/mean": m for m in ("thinking", "direct")}),
        ("Entropy of the decision", "nats", False, {"decision/entropy": "auto"}),
        ("Advantage gap", "thinking minus direct", False, {"advantage/gap": "auto"}),
        (
            "Groups that teach nothing",
            "share with equal rewards",
            True,
            {
                "group/zero_variance/union": "auto",
                "group/zero_variance/thinking": "thinking",
                "group/zero_variance/direct": "direct",
            },
        ),
        (
            "Cut, malformed, covert",
            "share of responses",
            True,
            {
                "truncation/thinking": "thinking",
                "truncation/direct": "direct",
                "malformed/rate": "difficulty-3",
                "covert_thinking/rate": "difficulty-2",
            },
        ),
    )
    labels = {"auto": "both modes", "difficulty-3": "malformed", "difficulty-2": "covert thinking"}
    for title, label, percent, names in specs:
        lines: list[Series] = []
        for name, color in names.items():
            text = labels.get(color, f"{color}, truncated" if name.startswith("truncation") else color)
            lines += smoothed(text, *series_of(records, "bpo", name), color)
        if lines:
            section.panels.append(Panel(title, "lines", lines, "BPO step", label, percent=percent))
    return section


def loss_section(records: Sequence[Record]) -> Section:
    section = Section("losses", "Losses and gradients", "By stage.", missing="No training steps were logged yet.")
    for stage in stages_of(records):
        for name, title in LOSSES.items():
            lines = smoothed(title, *series_of(records, stage, name), "auto")
            if lines:
                values = [value for value in lines[0].y if value is not None]
                wide = bool(values) and min(values) > 0 and max(values) > LOG_RANGE * min(values)
                share = name == "data/fill"
                section.panels.append(
                    Panel(f"{stage}: {title}", "lines", lines, "step", log=wide and not share, percent=share)
                )
    return section


def time_section(records: Sequence[Record], summary: Mapping[str, Any] | None) -> Section:
    section = Section(
        "time", "Where the time went", "Wall seconds on the main rank.", missing="No timings were logged yet."
    )
    stages = stages_of(records, timed=True)
    totals = {stage: {phase: sum(_timings(records, stage, phase).values()) for phase in PHASES} for stage in stages}
    bars = [
        Series(phase, [totals[stage][phase] for stage in stages], list(stages), f"phase-{phase}")  # type: ignore[arg-type]
        for phase in PHASES
        if any(totals[stage][phase] > NEGLIGIBLE * sum(totals[stage].values()) for stage in stages)
    ]
    if not bars:
        return section
    total = sum(sum(phases.values()) for phases in totals.values())
    peak = (summary or {}).get("peak_rss_gb")
    memory = f" Peak memory {peak:.2f} GB." if isinstance(peak, (int, float)) else ""
    section.panels.append(Panel("By stage", "rows", bars, "seconds", note=f"{total:.0f} s in all.{memory}", wide=True))
    for stage in stages:
        phases = [(phase, _binned(_timings(records, stage, phase), _steps(records, stage))) for phase in PHASES]
        floor = NEGLIGIBLE * sum(totals[stage].values())  # a sliver is invisible and only crowds the legend
        layers = [Series(phase, x, y, f"phase-{phase}") for phase, (x, y) in phases if totals[stage][phase] > floor]
        if layers and len(layers[0].x) > 1:
            heights = [sum(values) for values in zip(*(layer.y for layer in layers), strict=True)]
            limit = OUTLIER * median(heights)
            cut = limit if max(heights) > limit > 0 else None
            note = f"Bars above {limit:.3g} s are cut off." if cut else ""
            panel = Panel(f"{stage}: seconds per step", "stack", layers, "step", "seconds", note=note, cut=cut)
            section.panels.append(panel)
    return section


def stages_of(records: Sequence[Record], *, timed: bool = False) -> list[str]:
    """Stages in the order in which they ran."""
    found = (r["stage"] for r in records if not timed or any(key.startswith("timing_s/") for key in r))
    return list(dict.fromkeys(found))


def thin(x: list[int], y: list[float | None], limit: int = MAX_POINTS) -> tuple[list[int], list[float | None]]:
    """At most about ``limit`` points, evenly spaced, the last one always kept."""
    if len(x) <= limit:
        return x, y
    keep = sorted({*range(0, len(x), math.ceil(len(x) / limit)), len(x) - 1})
    return [x[i] for i in keep], [y[i] for i in keep]


def smoothed(name: str, x: list[int], y: list[float | None], color: str) -> list[Series]:
    """A centred running mean as a line over faint single points; a short series alone; [] for none."""
    if not x:
        return []
    if len(x) < 8:
        return [Series(name, x, y, color, markers=True)]
    half = max(2, len(x) // 40)
    mean: list[float | None] = []
    for index, value in enumerate(y):
        reach = min(half, index, len(y) - 1 - index)  # narrower at the ends, so that a falling curve keeps its start
        around = [v for v in y[index - reach : index + reach + 1] if v is not None]
        mean.append(None if value is None else sum(around) / len(around))
    return [Series(name, *thin(x, y), color, faint=True), Series(name, *thin(x, mean), color)]


def _timings(records: Sequence[Record], stage: str, phase: str) -> dict[int, float]:
    seconds: dict[int, float] = {}
    for record in records:
        value = record.get(f"timing_s/{phase}")
        if record["stage"] == stage and isinstance(value, (int, float)) and math.isfinite(value):
            seconds[record["step"]] = seconds.get(record["step"], 0.0) + value
    return seconds


def _steps(records: Sequence[Record], stage: str) -> list[int]:
    return sorted({r["step"] for r in records if r["stage"] == stage and any(k.startswith("timing_s/") for k in r)})


def _binned(seconds: Mapping[int, float], steps: Sequence[int]) -> tuple[list[int], list[float]]:
    """Mean seconds per step over bins of equally many steps; x is each bin's middle step."""
    size = max(1, math.ceil(len(steps) / MAX_BARS))
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [b[len(b) // 2] for b in bins], [sum(seconds.get(s, 0.0) for s in b) / len(b) for b in bins]
