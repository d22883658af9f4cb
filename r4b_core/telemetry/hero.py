"""The picture of a run for a README: thinking rate over BPO steps by difficulty, as SVG, drawn without a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from r4b_core.telemetry.files import write_atomic
from r4b_core.telemetry.metrics import read_metrics
from r4b_core.telemetry.panels import PROBABILITY_BY_DIFFICULTY, by_difficulty, difficulty_color
from r4b_core.telemetry.run import METRICS

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 110, 62, 52
LABEL_GAP = 18.0
# ink, soft ink, grid, background: the picture brings its background, so that it is readable on any page.
LIGHT = ("#1d1f22", "#5c6066", "#dedbd5", "#ffffff")
DARK = ("#eceae6", "#a4a7ac", "#3a3f45", "#1e2125")
# (light, dark) per difficulty, the report's colours.
COLORS = (
    ("#00876a", "#35c99f"),
    ("#8a7400", "#d9c24a"),
    ("#b0578d", "#e29cc8"),
    ("#1d1f22", "#f4f2ee"),
    ("#7a5cc9", "#ab95f0"),
    ("#7d4f2b", "#cfa27a"),
)


def hero_figure(run_path: str | Path, out: str | Path) -> Path:
    """Draw the free thinking rate (solid) and the mean probability of thinking (dashed) by difficulty.

    The picture carries its own light and dark colours and follows the reader's scheme where it is shown.

    Raises:
        ValueError: ``out`` is not an .svg file, or the run has no free probes to draw.
    """
    out = Path(out)
    if out.suffix.lower() != ".svg":
        raise ValueError(f"{out}: the picture is written as SVG; give a name that ends in .svg")
    records = read_metrics(Path(run_path) / METRICS)
    rates = by_difficulty(records)
    if not rates:
        raise ValueError(
            f"{run_path} has no thinking_rate/free/difficulty/* in {METRICS}: the run needs BPO steps with "
            "bpo.probe_every above 0"
        )
    write_atomic(out, _svg(rates, by_difficulty(records, PROBABILITY_BY_DIFFICULTY)))
    return out


Curves = dict[str, tuple[list[int], list[float | None]]]


def _svg(rates: Curves, probabilities: Curves) -> str:
    steps = [step for x, _ in rates.values() for step in x]
    low, high = min(steps), max(max(steps), min(steps) + 1)

    def px(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - low) / (high - low)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value

    names = list(rates)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-label="Thinking rate of free answers over BPO steps, by difficulty">',
        f"<style>{_style()}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<text class="title" x="{LEFT}" y="24">How often the model chooses to think</text>',
        f'<text x="{LEFT}" y="44">solid: share of free answers that think'
        + (", dashed: mean probability of thinking" if probabilities else "")
        + "</text>",
    ]
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{py(value):.1f}" x2="{WIDTH - RIGHT}" y2="{py(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py(value) + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    for step in _ticks(low, high):
        parts.append(f'<text x="{px(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">BPO step</text>')
    for curves, kind in ((probabilities, "dashed"), (rates, "solid")):
        for name, (x, y) in curves.items():
            color = difficulty_color(name, names if name in rates else list(curves))
            for run in _runs(x, y):
                points = " ".join(f"{px(step):.1f},{py(value):.1f}" for step, value in run)
                parts.append(f'<polyline class="curve {kind} c{color}" points="{points}"/>')
    ends = [
        (name, py(next(v for v in reversed(y) if v is not None)))
        for name, (_, y) in rates.items()
        if any(v is not None for v in y)
    ]
    for name, height in _apart(ends):
        color = difficulty_color(name, names)
        parts.append(
            f'<text class="label t{color}" x="{WIDTH - RIGHT + 10}" y="{height + 4:.1f}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _style() -> str:
    def scheme(dark: bool) -> str:
        ink, soft, grid, back = DARK if dark else LIGHT
        rules = [f".back{{fill:{back}}}text{{fill:{soft}}}.title{{fill:{ink}}}.grid{{stroke:{grid}}}"]
        rules += [f".c{i}{{stroke:{pair[dark]}}}.t{i}{{fill:{pair[dark]}}}" for i, pair in enumerate(COLORS)]
        return "".join(rules)

    return (
        'text{font:13px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}'
        ".title{font-size:17px;font-weight:600}.label{font-size:14px;font-weight:600}"
        ".curve{fill:none;stroke-width:2.6;stroke-linejoin:round;stroke-linecap:round}"
        ".dashed{stroke-width:1.5;stroke-dasharray:5 5;opacity:.75}"
        f"{scheme(False)}@media (prefers-color-scheme:dark){{{scheme(True)}}}"
    )


def _runs(x: Sequence[int], y: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """The stretches between gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(x, y, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _apart(ends: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Label heights moved apart so that none overlap, all within the picture."""
    placed: list[tuple[str, float]] = []
    floor = float("-inf")
    for name, height in sorted(reversed(ends), key=lambda end: end[1]):  # the harder one above where they meet
        floor = max(height, floor + LABEL_GAP)
        placed.append((name, floor))
    excess = max(0.0, floor - (HEIGHT - BOTTOM)) if placed else 0.0
    for index in range(len(placed) - 1, -1, -1):
        if excess <= 0:
            break
        name, height = placed[index]
        limit = HEIGHT - BOTTOM if index == len(placed) - 1 else placed[index + 1][1] - LABEL_GAP
        placed[index] = (name, min(height, limit))
    return placed


def _ticks(low: int, high: int) -> list[int]:
    """About six whole-numbered steps at round distances."""
    span = high - low
    distance = next(d * 10**e for e in range(12) for d in (1, 2, 5) if d * 10**e * 6 >= span)
    first = -(-low // distance) * distance
    return list(range(first, high + 1, distance))
