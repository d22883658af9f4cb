"""The stand-in does what its plan says, and counts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from r4b_core.curate.demo.standin import Fault, Kind, Plan, Rule, Running, respond, serve
from r4b_core.curate.generate import loops
from r4b_core.modes import THINK_CLOSE, THINK_OPEN
from r4b_core.rewards.answer import extract_answer

PLAN = Plan(
    models={
        "teacher": {
            "set/ä 1": Rule(answer="7", faults=(Fault.RATE_LIMITED, Fault.SERVER_ERROR)),
            "set/2": Rule(answer="7", wrong="9", kinds=(Kind.WRONG, Kind.TRUNCATED), heals_after=2),
        },
        "judge": {"set/2": Rule(text="DIFFERENT")},
    },
    retry_after=3,
)


def ask(server: Running, name: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"model": "teacher", "messages": [], "seed": 5} | body).encode()
    headers = {"X-R4B-Request": name, "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/chat/completions", data, headers)) as reply:
        return json.load(reply)


def test_replies_and_counts_follow_the_plan() -> None:
    name = "generate/0/0/set/%C3%A4%201"
    with serve(PLAN) as server:
        with pytest.raises(urllib.error.HTTPError) as limited:
            ask(server, name)
        assert limited.value.code == 429 and limited.value.headers["Retry-After"] == "3"
        with pytest.raises(urllib.error.HTTPError) as broken:
            ask(server, name)
        assert broken.value.code == 500
        first, again, other = ask(server, name), ask(server, name), ask(server, name, seed=6)
        assert first == again != other
        choice = first["choices"][0]
        assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith("<answer>7</answer>")
        assert first["usage"]["completion_tokens"] == len(choice["message"]["content"].split())
        with pytest.raises(urllib.error.HTTPError) as unknown:
            ask(server, name, model="nobody")
        assert unknown.value.code == 404 and "nobody" in unknown.value.read().decode()
        assert ask(server, "verify/0/0/set/2", model="judge")["choices"][0]["message"]["content"] == "DIFFERENT"
        with urllib.request.urlopen(f"{server.url}/models") as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == ["teacher", "judge"]
        counts = server.counts()
    assert counts["sent"] == {name: 5, "verify/0/0/set/2": 1}
    assert counts["finished"] == {name: 3, "verify/0/0/set/2": 1}


def test_kinds_are_what_they_are_called() -> None:
    def said(kind: Kind, attempt: int = 0) -> tuple[str, str]:
        return respond(PLAN, Rule(answer="7", wrong="9", kinds=(kind,), heals_after=2), "key", 0, attempt, 1)

    for kind, answer in ((Kind.RIGHT, "7"), (Kind.WRONG, "9")):
        text, finish = said(kind)
        assert finish == "stop" and extract_answer(text.removeprefix(THINK_OPEN)).answer == answer and not loops(text)
    assert said(Kind.TRUNCATED)[1] == "length" and THINK_CLOSE not in said(Kind.TRUNCATED)[0]
    assert said(Kind.FILTERED)[1] == "content_filter"
    assert loops(said(Kind.REPETITIVE)[0]) and said(Kind.REPETITIVE)[1] == "stop"
    assert extract_answer(said(Kind.MALFORMED)[0]).answer is None
    assert said(Kind.EMPTY) == ("", "stop")
    for kind in Kind:
        text, finish = said(kind, attempt=2)
        assert finish == "stop" and text.endswith("<answer>7</answer>")


def test_a_rollout_has_the_kind_of_its_number() -> None:
    rule = PLAN.models["teacher"]["set/2"]
    assert [rule.kind(k, 0) for k in range(4)] == [Kind.WRONG, Kind.TRUNCATED] * 2
    assert rule.kind(1, 2) is Kind.RIGHT


def test_a_taken_port_is_one_clear_error() -> None:
    with serve(Plan()) as server, pytest.raises(ValueError, match=rf"port {server.port}.*in use"):
        serve(Plan(), server.port)


def test_it_ends_with_whoever_started_it() -> None:
    code = (
        "import os, sys, time; from r4b_core.curate.demo.standin import Plan, serve; "
        "server = serve(Plan()); print(server.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
