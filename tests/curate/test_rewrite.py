"""Cleaning by a language model: replies read strictly, nothing lost over one that is not as it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r4b_core.curate.demo.standin import Plan, Rule, serve
from r4b_core.curate.runner import run_stage
from r4b_core.curate.standardize.rewrite import Finding, RewriteSettings, Rewriting, read_finding
from r4b_core.curate.standardize.run import standardize
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.store import Counts, dropped_rows, record_files
from r4b_core.curate.wire import ServedModel
from r4b_core.data.records import read_records
from tests.curate.raw import published


def said(error: str, corrected: str | None) -> str:
    return json.dumps({"error_type": error, "corrected": corrected})


@pytest.mark.parametrize(
    ("reply", "finding"),
    [
        ("NO PROBLEM", Finding()),
        ("<think>\nNo, {it} is.\n</think>\n NO PROBLEM\n", Finding()),
        (said("language", "How many?"), Finding("language", "How many?")),
        (said("no_checkable_answer", None), Finding("no_checkable_answer")),
        ("There is NO PROBLEM", None),
        ("no problem", None),
        (said("language", None), None),
        (said("language", " "), None),
        (said("style", "How many?"), None),
        (said("no_checkable_answer", "How many?"), None),
        ('{"error_type": "link", "corrected": "x", "note": 1}', None),
        ('```json\n{"error_type": "link", "corrected": "x"}\n```', None),
        ('{"error_type": ["link"], "corrected": "x"}', None),
        ("[" * 100000, None),
        ("", None),
    ],
)
def test_a_reply_is_one_of_two_or_none(reply: str, finding: Finding | None) -> None:
    assert read_finding(reply) == finding


ROWS = {
    "fine": ("What is one plus one?", "NO PROBLEM"),
    "chinese": ("一加二等于多少呢", said("language", "What is one plus two?")),
    "weak": ("See the figure.", said("instruction", "How many sides has a square?")),
    "still weak": ("Look at the picture.", said("instruction", "See the picture.")),
    "proof": ("Prove that it holds.", said("no_checkable_answer", None)),
    "chatty": ("What is two plus three?", "Sure! NO PROBLEM"),
    "marks": ("What is two plus four?", said("link", "[image] What is two plus four?")),
    "same": ("What is 一 plus one?", said("language", "What is one plus one?")),
    "empty": ("???", "NO PROBLEM"),
}


def run(folder: Path, url: str) -> Counts:
    model = ServedModel.model_validate({"model": "cleaner", "endpoints": [url], "max_tokens": 1000})
    return standardize(
        folder / "out",
        [InputSettings(path=str(folder / "rows.jsonl"))],
        StandardizeSettings(partition_rows=4, max_foreign=0.3),
        lambda store, work, advance: run_stage(store, work, 0, advance),
        rewriter=Rewriting(RewriteSettings(cleaner=model)),
    )


def test_the_stage_with_a_cleaner(tmp_path: Path) -> None:
    rows = [{"id": name, "question": question, "answer": "1"} for name, (question, _) in ROWS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    rules = {f"rows/{name}": Rule(text=text) for name, (_, text) in ROWS.items()}
    with serve(Plan(models={"cleaner": rules})) as server:
        counts = run(tmp_path, server.url)
        sent = sum(server.counts()["sent"].values())
        whole = published(tmp_path / "out")
        (tmp_path / "out" / "part-00001.json").unlink()
        run(tmp_path, server.url)
        assert sum(server.counts()["sent"].values()) == sent == 8, "what was paid for is not asked again"
    assert {name: data for name, data in published(tmp_path / "out").items() if "part" in name} == {
        name: data for name, data in whole.items() if "part" in name
    }
    kept = {r.id: r for path in record_files(tmp_path / "out") for r in read_records(path)}
    assert {name: (record.question, record.provenance["rewrite"]) for name, record in kept.items()} == {
        "fine": ("What is one plus one?", "no problem"),
        "chinese": ("What is one plus two?", "language"),
        "weak": ("How many sides has a square?", "instruction"),
        "chatty": ("What is two plus three?", "none: the reply is not as it was asked for"),
        "marks": ("What is two plus four?", "none: another number of <image> marks"),
    }
    told = {drop.id: (drop.reason, drop.file, drop.row) for drop in dropped_rows(tmp_path / "out")}
    assert told == {
        "still weak": ("weak question", "rows.jsonl", 3),
        "proof": ("no checkable answer", "rows.jsonl", 4),
        "same": ("duplicate", "rows.jsonl", 7),
        "empty": ("empty question", "rows.jsonl", 8),
        "rows-9": ("not JSON", "rows.jsonl", 9),
    }
    assert counts.read == 10 == counts.num_kept + counts.dropped.total() + counts.quarantined.total()
    assert not (tmp_path / "out" / "rewritten").exists()
