"""The report in a real browser: drawn, without an error, at every width and in both colour schemes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r4b_core.telemetry.report import write_report
from tests.browser import browse, needs_browser

pytestmark = needs_browser


def test_every_plot_is_drawn_and_nothing_fails(finished_run: Path, tmp_path: Path) -> None:
    page = write_report(finished_run)
    dom, console = browse(page, tmp_path, "--window-size=1280,900", "--dump-dom")
    assert console == "" and 'data-ready="true"' in dom
    places = dom.count("data-panel=")
    assert places >= 15
    assert len(re.findall(r'class="plot[^"]*js-plotly-plot', dom)) == places
    drawn_lines = len(re.findall(r'<path class="js-line" [^>]*d="M[^"]{20,}', dom))
    drawn_bars = len(re.findall(r'<g class="point"><path d="M[^"]{10,}', dom))
    assert drawn_lines >= 30 and drawn_bars >= 60
    assert (
        dom.count('class="rollout"') == 8
        and len(re.findall(r'<img alt="image of the question"[^>]* src="data:', dom)) == 1
    )


def test_hostile_text_runs_nothing(filled_run: Callable[..., Path], tmp_path: Path) -> None:
    hostile = (
        "</script><script>document.documentElement.setAttribute('data-hacked', 1)</script><img src=x onerror=oops()>"
    )
    dom, console = browse(write_report(filled_run(question=hostile)), tmp_path / "profile", "--dump-dom")
    assert console == "" and "data-hacked=" not in dom.split("<body")[0]
    assert "&lt;img src=x onerror=oops()&gt;" in dom, "the question is shown, as text"


def test_an_empty_run_draws_nothing_and_fails_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    dom, console = browse(write_report(tmp_path / "run"), tmp_path / "profile", "--dump-dom")
    assert console == "" and 'data-ready="true"' in dom and "No BPO steps yet" in dom


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 390)])
def test_colours_follow_the_scheme_and_nothing_overflows(
    finished_run: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    picture = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    page = write_report(finished_run)
    if width < 500:  # a headless window is never narrower, a frame can be
        frame = f'<body style="margin:0"><iframe src="{page.as_uri()}" width="{width}" height="3000" style="border:0">'
        page = tmp_path / "frame.html"
        page.write_text(frame)
    size = f"--window-size={max(width, 500)},3000"
    browse(page, tmp_path / "profile", setting, size, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)[:, :width]
    paper = (0x16, 0x18, 0x1B) if scheme == "dark" else (0xFB, 0xFA, 0xF8)
    assert (pixels[-1, 2] == paper).all() and (pixels[:, width - 3] == paper).all(), "the margins are empty"
    thinking = (0xF5, 0x91, 0x49) if scheme == "dark" else (0xC4, 0x51, 0x0A)
    assert (pixels == thinking).all(axis=-1).sum() > 500, "the thinking mode's colour is on the page"
