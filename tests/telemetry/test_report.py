"""The report: complete, self-contained, unbreakable by what it quotes, calm about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from r4b_core.config.recipe import Recipe
from r4b_core.rollout.types import Group
from r4b_core.telemetry.hero import hero_figure
from r4b_core.telemetry.panels import loss_section, series_of, smoothed, thin, time_section
from r4b_core.telemetry.report import script_json, write_report
from r4b_core.telemetry.run import RunFolder
from r4b_core.telemetry.viewer import collect_groups, select, spread

HOSTILE = "</script><script>hacked = 1</script><img src=x onerror=alert(1)> & \u2028 {{ 7919*7919 }} \" '"


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page's data script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data = ""
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._script = (dict(attributes).get("id") or "other") if tag in ("script", "style") else self._script

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._script = ""

    def handle_data(self, text: str) -> None:
        if self._script == "data":
            self.data += text
        elif not self._script:
            self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_finished_run_has_every_section(finished_run: Path) -> None:
    page = page_of(finished_run)
    panels = json.loads(page.data)["panels"]
    places = [int(a["data-panel"] or -1) for _, a in page.tags if a.get("data-panel")]
    assert places == list(range(len(panels))) and len(panels) >= 15
    titles = [panel["title"] for panel in panels]
    for title in (
        "Thinking rate of free answers",
        "Accuracy",
        "Reward",
        "Entropy of the decision",
        "bpo: loss",
        "By stage",
    ):
        assert title in titles
    for word in (
        "laptop demo",
        "seed 3",
        "1 alarm",
        "raise bpo.max_new_tokens",
        "64 of 160 groups",
        "torch",
        "100.0 %",
    ):
        assert word in page.text
    assert all(series["y"] for panel in panels for series in panel["series"])


def test_the_page_is_self_contained_and_small(finished_run: Path) -> None:
    path = write_report(finished_run)
    assert path == finished_run / "report.html" and path.stat().st_size < 8e6
    for tag, attributes in Page(path.read_text(encoding="utf-8")).tags:
        assert tag not in ("link", "iframe", "object") and not attributes.get("src") and not attributes.get("href")


def test_hostile_strings_stay_text(filled_run: Callable[..., Path]) -> None:
    run = filled_run(question=HOSTILE)
    with RunFolder(run, console=False) as folder:
        folder.start(Recipe(name=HOSTILE), resumed_at=("bpo", 100))
        folder.metrics.log("bpo", 101, {f"alarm/{HOSTILE}": HOSTILE, "truncation/thinking": 0.9})
    summary = json.loads((run / "summary.json").read_text())
    summary["after_bpo"][HOSTILE] = summary["after_bpo"]["hard"]
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not [a for tag, a in page.tags if tag == "img" or "onerror" in a]
    questions = [group["question"] for step in json.loads(page.data)["steps"] for group in step["groups"]]
    assert set(questions) == {HOSTILE} and str(7919 * 7919) not in page.text


def test_script_json_round_trips_what_html_would_eat() -> None:
    value = {"a": "</script><!--\u2028\u2029&", "b": [1, None]}
    text = script_json(value)
    assert json.loads(text) == value and not set("<>&\u2028\u2029") & set(text)
    assert json.loads(script_json("half \ud83d token")) == "half ? token"


@pytest.mark.parametrize(
    "missing", ["summary.json", "rollouts", "metrics.jsonl", "environment.json", "recipe.resolved.yaml"]
)
def test_each_missing_part_is_a_sentence(finished_run: Path, tmp_path: Path, missing: str) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    sentences = {
        "summary.json": "No evaluation yet",
        "rollouts": "No rollouts were written",
        "metrics.jsonl": "No BPO steps yet",
    }
    assert sentences.get(missing, "At a glance") in page_of(run).text


def test_an_empty_folder_and_a_run_without_bpo_have_reports(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert json.loads(page.data) == {"panels": [], "steps": []} and "No BPO steps yet" in page.text
    with RunFolder(tmp_path / "run", console=False) as run:
        run.start(Recipe(name="only annealing", bpo={"steps": 0}))
        run.metrics.log("anneal", 1, {"loss": float("nan")})
        side = {"hard": {"auto": {"accuracy": 0.5, "mean_tokens": 4.0, "thinking_rate": 0.0}}}
        run.write_summary({"before_bpo": side, "after_bpo": side})
    text = page_of(tmp_path / "run").text
    assert "only annealing" in text and "50.0 % 4.0 0.0 % – – –" in text, "no BPO, so no evaluation after it"


def test_damaged_files_are_named_on_the_page(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "summary.json").write_text("{half")
    (run / "environment.json").write_text("[]")
    (run / "recipe.resolved.yaml").write_text("a: [")
    (run / "metrics.jsonl").write_text("oops\n{}\n")
    (run / "rollouts" / "bpo-step_000010.parquet").write_bytes(b"PAR1")
    text = page_of(run).text
    for name in (
        "summary.json",
        "environment.json",
        "recipe.resolved.yaml",
        "metrics.jsonl",
        "bpo-step_000010.parquet",
    ):
        assert name in text


@pytest.mark.parametrize("side", [[], {"hard": 3}, {"hard": {"auto": []}}, {"hard": {"auto": {"accuracy": "high"}}}])
def test_a_summary_of_another_shape_is_left_out(tmp_path: Path, side: object) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"before_bpo": side, "after_bpo": side}))
    assert "No evaluation yet" in page_of(tmp_path).text


def test_numbers_that_are_none_or_nan_are_dashes(tmp_path: Path) -> None:
    cells = {"hard": {"auto": {"accuracy": float("nan"), "mean_tokens": None, "thinking_rate": 0.25}}}
    (tmp_path / "summary.json").write_text(json.dumps({"after_bpo": cells, "seconds": 3, "peak_rss_gb": "much"}))
    (tmp_path / "recipe.resolved.yaml").write_text("bpo: 3\nname: 7\nmodel: []\n")
    (tmp_path / "environment.json").write_text('{"versions": 1, "hardware": null, "date": 2}')
    assert "auto – – – – – 25.0 %" in page_of(tmp_path).text


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_the_viewer_keeps_to_its_budget(finished_run: Path) -> None:
    full, tight = collect_groups(finished_run), collect_groups(finished_run, max_bytes=60_000)
    assert (full.total, tight.total) == (160, 160) and 0 < tight.shown < full.shown == 64
    assert len(json.dumps(tight.steps)) < 61_000
    assert [full.steps[0]["label"], full.steps[-1]["label"]] == ["bpo, step 10", "bpo, step 100"]


def test_groups_are_chosen_by_difficulty_and_for_differing_rewards(group: Callable[..., Group]) -> None:
    groups = [group(i, "easy" if i < 8 else "hard", 0.5) for i in range(12)]
    for index in (0, 1, 2, 3, 8, 9):
        for rollout in groups[index].rollouts:
            rollout.reward = 1.0
    for index in (4, 10):
        groups[index].rollouts[0].reward, groups[index].rollouts[1].reward = 0.0, 1.0
    picked = select(groups, 4)
    assert {4, 10} <= set(picked) and sum(i >= 8 for i in picked) == 2
    assert select(groups, 99) == list(range(12)) and select([], 4) == []
    assert spread(list(range(100)), 3) == [0, 50, 99] and spread([1, 2], 3) == [1, 2]


def test_series_keep_gaps_and_ends() -> None:
    records = [{"stage": "bpo", "step": s, "loss": float("nan") if s == 3 else float(s)} for s in (1, 2, 3, 4)]
    assert series_of([*records, {"stage": "anneal", "step": 9, "loss": 1.0}], "bpo", "loss") == (
        [1, 2, 3, 4],
        [1.0, 2.0, None, 4.0],
    )
    x, y = thin(list(range(1001)), [float(i) for i in range(1001)], limit=100)
    assert x[0] == 0 and x[-1] == 1000 and len(x) <= 102 and y == [float(i) for i in x]
    faint, strong = smoothed("loss", list(range(40)), [float(40 - i) for i in range(40)], "auto")
    assert faint.faint and strong.y == pytest.approx(faint.y), "a straight line is its own running mean, ends included"


def test_one_long_step_does_not_flatten_the_others() -> None:
    records = [{"stage": "bpo", "step": s, "timing_s/update": 9.0 if s == 5 else 0.1} for s in range(1, 21)]
    panel = time_section(records, None).panels[-1]
    assert panel.cut == pytest.approx(0.3) and "0.3 s" in panel.note
    assert time_section(records[:4], None).panels[-1].cut is None


@pytest.mark.parametrize(("losses", "log"), [([9.0, 0.1], True), ([2.0, 0.5], False), ([9.0, -0.1], False)])
def test_a_loss_that_falls_far_gets_a_logarithmic_axis(losses: list[float], log: bool) -> None:
    records = [{"stage": "anneal", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert loss_section(records).panels[0].log is log


def test_hero_figure_is_svg_with_one_curve_per_difficulty(finished_run: Path, tmp_path: Path) -> None:
    out = hero_figure(finished_run, tmp_path / "hero.svg")
    root = ElementTree.fromstring(out.read_text(encoding="utf-8"))
    name = "{http://www.w3.org/2000/svg}"
    curves = root.findall(f"{name}polyline")
    assert (
        sum("solid" in c.get("class", "") for c in curves) == 4 == sum("dashed" in c.get("class", "") for c in curves)
    )
    labels = [t.text for t in root.findall(f"{name}text") if "label" in t.get("class", "")]
    assert sorted(str(label) for label in labels) == ["direct", "easy", "hard", "mid"]
    heights = sorted(float(t.get("y", 0)) for t in root.findall(f"{name}text") if "label" in t.get("class", ""))
    assert all(b - a > 17 for a, b in zip(heights, heights[1:], strict=False)) and heights[-1] < 380
    last = next(c for c in curves if c.get("class") == "curve solid c3").get("points", "").split()[-1]
    assert last == "650.0,62.0", "thinking rate 1 at the last step is the top right corner"


def test_hero_figure_says_what_it_needs(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=".svg"):
        hero_figure(finished_run, tmp_path / "hero.png")
    with pytest.raises(ValueError, match="probe_every"):
        hero_figure(tmp_path, tmp_path / "hero.svg")
