"""The page of the data engine: its figures against the folders, hostile text, and what is missing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r4b_core.curate.stage import Drop, Outcome
from r4b_core.curate.stats import write_stats
from r4b_core.curate.stats.collect import MAX_SOURCES, OTHER, collect
from r4b_core.curate.stats.samples import MAX_PER_REASON, collect_samples
from r4b_core.curate.store import Partition, open_stage
from r4b_core.data.records import Record
from tests.browser import browse, needs_browser

HOSTILE = "</script><img src=x onerror=alert(1)> & \u2028 {{ 7919*7919 }} \" '"


def png(side: int = 24) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 120, np.uint8)).save(out, "PNG")
    return out.getvalue()


def made(index: int, **values: object) -> Record:
    whole = dict(id=str(index), source="geo" if index % 3 else "charts", question=f"What is {index}?", images=[png()])
    return Record(**{**whole, "answer": str(index), **values})  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three stages over two partitions of 30 rows: 60 -> 56 -> 50 -> 40."""
    run = tmp_path / "small"

    def stage(number: int, name: str, outcome: Callable[[int], Outcome]) -> None:
        partitions = [Partition(i, f"in-{i}", {"name": f"in-{i}"}) for i in range(2)]
        with open_stage(run / f"{number}-{name}", name, {}, partitions) as store:
            for partition in partitions:
                with store.write(partition) as writer:
                    result = outcome(partition.index)
                    writer.add(len(result.kept) + len(result.dropped), result)

    def standardize(part: int) -> Outcome:
        rows = range(30 * part, 30 * part + 30)
        drops = [
            Drop(str(rows[0]), "geo", "duplicate"),
            Drop("?", HOSTILE, "not an image", HOSTILE, True, "a.jsonl", 7),
        ]
        return Outcome([made(i, question=HOSTILE if i == 5 else f"What is {i}?") for i in rows[2:]], drops)

    def verify(part: int) -> Outcome:
        rows = range(30 * part + 2, 30 * part + 30)
        kept = [
            made(i, response=f"<think>\n{HOSTILE}</think>{i}", verdict="right", response_tokens=i) for i in rows[3:]
        ]
        return Outcome(kept, [Drop(str(i), "geo" if i % 3 else "charts", "wrong answer") for i in rows[:3]])

    def score(part: int) -> Outcome:
        rows = range(30 * part + 5, 30 * part + 30)
        kept = [made(i, response_tokens=i, verdict="right", tries=4, right=i % 5) for i in rows[5:]]
        return Outcome(kept, [Drop(str(i), "geo" if i % 3 else "charts", "too few tries") for i in rows[:5]])

    stage(1, "standardize", standardize)
    stage(2, "verify", verify)
    stage(3, "score", score)
    return run


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
        else:
            self.text += data


def test_the_funnel_is_that_of_the_folders(run: Path) -> None:
    figures = collect(run)
    assert [(s.name, s.counts.read, s.counts.num_kept) for s in figures.stages] == [
        ("standardize", 60, 56),
        ("verify", 56, 50),
        ("score", 50, 40),
    ]
    for before, after in zip(figures.stages, figures.stages[1:], strict=False):
        assert after.counts.read == before.counts.num_kept
    assert figures.stages[0].reasons == [("duplicate", 2, {"geo": 2}, False), ("not an image", 2, {HOSTILE: 2}, True)]
    lengths, rates = figures.histograms
    assert sum(bar.count for bar in lengths.bars) == 40 and lengths.missing == 0
    assert [bar.label for bar in rates.bars] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert [bar.count for bar in rates.bars] == [8] * 5 and "mean 0.50" in rates.note
    assert figures.kept(figures.stages[2], "geo") + figures.kept(figures.stages[2], "charts") == 40


def test_the_page_says_so_and_hostile_text_stays_text(run: Path) -> None:
    path = write_stats(run)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run / "stats.html"
    for word in ("small", "66.7 %", "wrong answer", "not an image", "geo", "quarantined", "mean 0.50"):
        assert word in page.text
    assert [tag for tag, _ in page.tags].count("script") == 3
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe") and "onerror" not in attributes and not attributes.get("src")
    assert str(7919 * 7919) not in page.text
    samples = json.loads(page.data)["samples"]
    assert any(HOSTILE in (sample.get("detail") or "") for sample in samples)


def test_samples_show_what_went_through_and_each_reason(run: Path) -> None:
    samples = collect_samples(collect(run).stages)
    kept = [sample for sample in samples if sample["reason"] is None]
    assert len(kept) == 40 and all(sample["images"][0].startswith("data:image/") for sample in kept)
    assert {tuple(sample["rate"]) for sample in kept} == {(right, 4) for right in range(5)}
    by_reason = [sample for sample in samples if sample["reason"] == "wrong answer"]
    assert len(by_reason) == MAX_PER_REASON and all(sample["question"] for sample in by_reason)
    lost = next(sample for sample in samples if sample["reason"] == "not an image")
    assert lost["place"] == "a.jsonl, row 7" and "question" not in lost


def test_samples_keep_to_their_size(run: Path) -> None:
    some = collect_samples(collect(run).stages, max_bytes=4000)
    assert 0 < len(some) < 40 and len(json.dumps(some)) <= 4100


def test_an_unfinished_stage_says_so(run: Path) -> None:
    (run / "3-score" / "part-00001.json").unlink()
    assert "score is not finished: 1 of 2 partitions" in Page(write_stats(run).read_text()).text


def test_small_sources_go_together(tmp_path: Path) -> None:
    partition = Partition(0, "x", {"name": "x"})
    with open_stage(tmp_path / "1-standardize", "standardize", {}, [partition]) as store:
        with store.write(partition) as writer:
            kept = [made(i, source=f"s{i % 40:02}", images=[]) for i in range(100)]
            writer.add(100, Outcome(kept))
    figures = collect(tmp_path)
    assert len(figures.sources) == MAX_SOURCES and figures.sources[-1] == OTHER
    assert sum(figures.kept(figures.stages[0], source) for source in figures.sources) == 100
    assert not [histogram for histogram in figures.histograms if histogram.bars]
    assert "What the records look like" not in Page(write_stats(tmp_path).read_text()).text


def test_a_folder_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no output of a stage"):
        write_stats(tmp_path)


@needs_browser
def test_a_browser_shows_the_records_and_runs_nothing_hostile(run: Path, tmp_path: Path) -> None:
    dom, console = browse(write_stats(run), tmp_path / "profile", "--dump-dom")
    assert console == "" and 'data-ready="true"' in dom
    assert len(re.findall(r'<img alt="image of the question" src="data:', dom)) == 1
    assert "kept by score (40)" in dom and re.search(r"student \d of 4 right", dom)
