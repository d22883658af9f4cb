"""generate: what the teacher said is in the output, whatever happened on the way, and nothing is paid for twice."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r4b_core.curate.client import Background
from r4b_core.curate.demo.standin import Fault, Kind, Rule, Running, serve
from r4b_core.curate.endpoints import EndpointError
from r4b_core.curate.generate import CaptionSettings, GenerateSettings, loops, open_generate
from r4b_core.curate.journal import Journal
from r4b_core.curate.score import ScoreSettings
from r4b_core.curate.stage import Outcome
from r4b_core.curate.store import folder_counts
from r4b_core.data.records import Record, read_records
from r4b_core.rewards.answer import extract_answer
from tests.curate.served import (
    QUICK,
    faulty_rules,
    output,
    picture,
    plan,
    records,
    rules,
    run_asking,
    served,
    write_parts,
)


def generate(rows: list[Record], settings: GenerateSettings, journal: Path) -> Outcome:
    with Background() as background, Journal(journal) as kept, open_generate(settings, background, kept) as stage:
        return stage(rows)


def answers(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line[42:]) for line in journal.read_bytes().splitlines()]


def test_every_fault_that_heals_is_healed(tmp_path: Path) -> None:
    write_parts(tmp_path / "in", records(44), 3)
    with serve(plan({"teacher": faulty_rules(44)})) as server:
        settings = GenerateSettings(teacher=served(server.url, "teacher"), regenerate=1)
        run_asking("generate", settings, tmp_path / "in", tmp_path / "out")
        counts = server.counts()
    kept = [record for path in sorted((tmp_path / "out").glob("*.parquet")) for record in read_records(path)]
    assert [record.id for record in kept] == [f"{number:04d}" for number in range(44)]
    assert folder_counts(tmp_path / "out").num_kept == 44
    for number, record in enumerate(kept):
        looping = number % 4 == 3 and number % 8 != 3  # heals with another seed, or does not
        attempts = 2 if number % 4 in (2, 3) else 1
        wrong_at_first = number % 4 == 1
        assert record.response is not None and record.response.startswith("<think>")
        assert loops(record.response) == looping
        found = extract_answer(record.response.removeprefix("<think>")).answer
        if number % 4 == 2:  # cut off with every seed: rollout 0 of both attempts
            assert record.finish_reason == "length" and found is None
        else:
            assert record.finish_reason == "stop"
            assert found == ("no idea" if wrong_at_first else record.answer)
        assert record.response_tokens == len(record.response.split())
        assert record.provenance["teacher"] == "teacher" and record.provenance["teacher_attempts"] == str(attempts)
        assert record.provenance["teacher_prompt"].startswith("distill ")
        sent = counts["sent"][f"generate/0/0/sums/{number:04d}"]
        planned = len(faulty_rules(44)[record.key].faults)
        assert sent == 1 + planned, number
    assert len({record.provenance["teacher_seed"] for record in kept}) == 44


def test_what_fails_for_good_is_dropped_and_counted(tmp_path: Path) -> None:
    table = rules(
        20,
        n2=Rule(faults=(Fault.REFUSED,)),
        n3=Rule(faults=(Fault.SERVER_ERROR,), always=True),
        n5=Rule(faults=(Fault.HTML,), always=True),
        n7=Rule(faults=(Fault.ENORMOUS,), always=True),
        n9=Rule(faults=(Fault.DRIP,), always=True),
        n11=Rule(faults=(Fault.HALF,), always=True),
    )
    rows = records(20)
    rows[13].images = [b"no picture"]
    rows[14].question = "<image> and <image>?"
    with serve(plan({"stand-in": table})) as server:
        impatient = QUICK.model_copy(update={"idle_timeout_s": 0.5, "tries": 3})
        settings = GenerateSettings(teacher=served(server.url, calls=impatient))
        outcome = generate(rows, settings, tmp_path / "journal")
        first = server.counts()["sent"]
        again = generate(rows, settings, tmp_path / "journal")
        second = server.counts()["sent"]
    dropped = {int(drop.id): drop for drop in outcome.dropped}
    reasons = {2: "request refused", 3: "server error", 5: "no JSON reply", 7: "reply too large", 9: "timeout"}
    reasons |= {11: "connection", 13: "request cannot be made", 14: "request cannot be made"}
    assert {number: drop.reason for number, drop in dropped.items()} == reasons
    assert [drop.quarantined for drop in outcome.dropped] == [number in (13, 14) for number in sorted(reasons)]
    assert "planned to be refused" in dropped[2].detail and "HTTP 400" in dropped[2].detail
    assert "engine died" in dropped[3].detail and "Please sign in" in dropped[5].detail
    assert "marks" in dropped[14].detail or "<image>" in dropped[14].detail
    assert len(outcome.kept) + len(outcome.dropped) == 20
    # Answers and the server's refusal are final; what failed for its sake is tried again.
    repeated = {int(name[-4:]) for name in second if second[name] != first[name]}
    assert repeated == {3, 5, 7, 9, 11}
    assert [record.response for record in again.kept] == [record.response for record in outcome.kept]


def test_refused_requests_are_repeated_on_demand(tmp_path: Path) -> None:
    with serve(plan({"stand-in": rules(3, n1=Rule(answer="2", faults=(Fault.REFUSED,)))})) as server:
        settings = GenerateSettings(teacher=served(server.url))
        assert len(generate(records(3), settings, tmp_path / "journal").dropped) == 1
        assert len(generate(records(3), settings, tmp_path / "journal").dropped) == 1
        settings = GenerateSettings(teacher=served(server.url), retry_refused=True)
        assert len(generate(records(3), settings, tmp_path / "journal").dropped) == 0
        assert len(generate(records(3), GenerateSettings(teacher=served(server.url)), tmp_path / "journal").kept) == 3


def test_other_settings_mean_other_answers_and_cost_no_old_ones(tmp_path: Path) -> None:
    with serve(plan()) as server:
        warm = GenerateSettings(teacher=served(server.url))
        cold = GenerateSettings(teacher=served(server.url, temperature=0.5))
        patient = GenerateSettings(teacher=served(server.url, calls={"tries": 7}))
        first = generate(records(4), warm, tmp_path / "journal")
        generate(records(4), cold, tmp_path / "journal")
        assert generate(records(4), patient, tmp_path / "journal") == first
        assert generate(records(4), warm, tmp_path / "journal") == first
        edited = records(4)
        edited[1].question += " Really?"
        edited[2].images = [picture()[:-1] + b"?"]  # as many bytes as before
        generate(edited, warm, tmp_path / "journal")
        assert sorted(server.counts()["sent"].values()) == [2, 2, 3, 3]
    assert warm.content == patient.content != cold.content


def test_what_the_journal_holds_needs_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(plan()) as server:
        settings = GenerateSettings(teacher=served(server.url))
        outcome = generate(records(5), settings, tmp_path / "journal")
    assert generate(records(5), settings, tmp_path / "journal") == outcome
    with pytest.raises(
        EndpointError, match=r"generate.teacher: no endpoint can be used.*cannot connect: Connection refused"
    ):
        generate(records(30), settings, tmp_path / "journal")
    gc.collect()
    assert "Unclosed" not in caplog.text


def test_captions_are_whole_or_missing(tmp_path: Path) -> None:
    rows = records(4)
    rows[3].images, rows[3].question = [], "What is 3 + 1?"
    captions = {
        "sums/0000": Rule(text="<think>\nlook\n</think>\n\nA square."),
        "sums/0001": Rule(kinds=(Kind.TRUNCATED,)),
        "sums/0002": Rule(faults=(Fault.REFUSED,)),
    }
    with serve(plan({"stand-in": rules(4), "captioner": captions})) as server:
        caption = CaptionSettings(enabled=True, captioner=served(server.url, "captioner"))
        settings = GenerateSettings(teacher=served(server.url), caption=caption)
        kept = generate(rows, settings, tmp_path / "journal").kept
        body = server.counts()["sent"]
    assert [record.caption for record in kept] == ["A square.", None, None, None]
    missing = [record.provenance.get("caption_missing") for record in kept]
    assert missing == [None, "finish_reason length", "request refused", None]
    assert all(record.response for record in kept)
    assert "caption/0/0/sums/0003" not in body and "captioner" not in kept[3].provenance


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault.UNAUTHORIZED, "requests in a row failed.*unauthorized"),
        (Fault.HTML, "requests in a row failed.*Please sign in"),
        (Fault.REFUSED, "requests in a row failed.*planned to be refused"),
    ],
)
def test_a_server_that_fails_everything_stops_the_stage(tmp_path: Path, fault: Fault, words: str) -> None:
    table = {key: Rule(faults=(fault,), always=True) for key in rules(40)}
    with serve(plan({"stand-in": table})) as server:
        settings = GenerateSettings(teacher=served(server.url))
        with pytest.raises(EndpointError, match=words):
            generate(records(40), settings, tmp_path / "journal")


def test_a_wrong_model_name_stops_the_stage_with_those_there_are(tmp_path: Path) -> None:
    with serve(plan({"teacher-8b": {}})) as server:
        settings = GenerateSettings(teacher=served(server.url, "teacher-80b"))
        with pytest.raises(EndpointError, match=r"no such model.*`teacher-80b` does not exist.*serves teacher-8b"):
            generate(records(30), settings, tmp_path / "journal")


def test_a_full_disk_stops_the_stage_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from r4b_core.curate import journal

    real, written = os.write, 0

    def nearly_full(handle: int, data: bytes) -> int:
        nonlocal written
        if len(data) < 100:  # the event loop wakes itself by writing too
            return real(handle, data)
        written += 1
        if written > 5:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    with serve(plan()) as server, Background() as background:
        settings = GenerateSettings(teacher=served(server.url))
        with monkeypatch.context() as patch, Journal(tmp_path / "journal", room_wait_s=0.0) as kept:
            patch.setattr(journal.os, "write", nearly_full)
            with (
                pytest.raises(ValueError, match="No space left on device.*5 answers are safe"),
                open_generate(settings, background, kept) as stage,
            ):
                stage(records(40))
        before = server.counts()["finished"]
        names = [f"generate/0/0/{entry['key']}" for entry in answers(tmp_path / "journal")]
        assert len(names) == 5
        assert len(generate(records(40), settings, tmp_path / "journal").kept) == 40
        after = server.counts()["finished"]
        assert all(after[name] == before[name] == 1 for name in names)


Target = Callable[[str, Any, Path, Path], None]


def kill_and_resume(
    stage: str, settings: Any, server: Running, source: Path, folder: Path, kills: int, seed: int
) -> None:
    """Run a stage, kill it at random moments, and see that no answer in the journal is asked for again."""
    rng = random.Random(seed)
    context = multiprocessing.get_context("fork")
    journal = folder / "answers.jsonl"
    known: dict[str, int] = {}
    killed = 0
    for kill in range(kills + 1):
        process = context.Process(target=run_asking, args=(stage, settings, source, folder))
        held = journal.stat().st_size if journal.exists() else 0
        process.start()
        if kill < kills:
            # Let it get on by a random number of answers, then to a random moment.
            wanted, deadline = held + rng.randrange(12_000), time.monotonic() + 20
            while process.is_alive() and time.monotonic() < deadline:
                if (journal.stat().st_size if journal.exists() else 0) >= wanted:
                    break
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            process.kill()
        process.join(60)
        assert process.exitcode in ((0, -9) if kill < kills else (0,))
        killed += process.exitcode == -9
        sent = server.counts()["sent"]
        assert all(sent[name] == times for name, times in known.items()), "a finished request was sent again"
        whole = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        entries = [json.loads(line[42:]) for line in whole if line.endswith(b"\n")]
        names = Counter(f"{entry['stage']}/{entry['k']}/{entry['attempt']}/{entry['key']}" for entry in entries)
        assert set(names.values()) <= {1}
        known = {name: sent[name] for name in names}
    assert killed >= kills // 2


def check_kills(stage: str, make: Callable[[str], Any], tmp_path: Path, kills: int, count: int, seed: int) -> None:
    write_parts(tmp_path / "in", records(count), 3)
    model = {"stand-in": faulty_rules(count)}
    with serve(plan(model, latency_s=0.02)) as server:
        run_asking(stage, make(server.url), tmp_path / "in", tmp_path / "whole")
    with serve(plan(model, latency_s=0.02)) as server:
        kill_and_resume(stage, make(server.url), server, tmp_path / "in", tmp_path / "killed", kills, seed)
    whole, killed = output(tmp_path / "whole"), output(tmp_path / "killed")
    assert len(whole) == 9 and whole == killed


def make_generate(url: str) -> GenerateSettings:
    return GenerateSettings(teacher=served(url), regenerate=1)


def make_score(url: str) -> ScoreSettings:
    return ScoreSettings(student=served(url), k=3)


@pytest.mark.parametrize(("stage", "make"), [("generate", make_generate), ("score", make_score)])
def test_kill_9_loses_nothing_that_was_paid_for(stage: str, make: Callable[[str], Any], tmp_path: Path) -> None:
    check_kills(stage, make, tmp_path, kills=3, count=48, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "make"), [("generate", make_generate), ("score", make_score)])
def test_kill_9_at_ten_moments(stage: str, make: Callable[[str], Any], tmp_path: Path) -> None:
    check_kills(stage, make, tmp_path, kills=10, count=150, seed=1)
