"""A stand-in for vLLM or SGLang: an OpenAI-compatible server on loopback whose answers and faults follow a plan.

It needs no model. Models are names with rules by record key; a request says by its ``X-R4B-Request`` header which
record, rollout and attempt it is for. The same request gets the same text again, and every request is counted, so that
a test or the demo can compare what a stage reports with what was planted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from r4b_core.modes import THINK_CLOSE, THINK_OPEN

REQUEST_HEADER = "X-R4B-Request"
_WORDS = (
    "the figure shows that given values add up so we compare both sides and check each step against what is drawn "
    "then solve for the unknown count rows measure angles read labels substitute simplify verify units hence result"
).split()
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class Kind(StrEnum):
    """What an answer is like."""

    RIGHT = "right"
    WRONG = "wrong"
    TRUNCATED = "truncated"  # finish_reason length
    FILTERED = "filtered"  # finish_reason content_filter
    REPETITIVE = "repetitive"
    MALFORMED = "malformed"  # the reasoning is never closed
    EMPTY = "empty"


class Fault(StrEnum):
    """What happens to a request instead of an answer."""

    RATE_LIMITED = "429"
    SERVER_ERROR = "500"
    REFUSED = "400"
    UNAUTHORIZED = "401"
    SLOW = "slow"  # answered after Plan.slow_s
    HUNG = "hung"  # never answered
    DROPPED = "dropped"  # closed without a byte
    HALF = "half"  # closed in the middle of the body
    DRIP = "drip"  # headers, then a byte a second
    HTML = "html"
    NOT_JSON = "not_json"  # a JSON content type and no JSON behind it
    ENORMOUS = "enormous"  # a body of 256 MB


@dataclass(frozen=True)
class Rule:
    """How a model treats the requests for one record.

    Attributes:
        answer, wrong: the short answers that a right and a wrong response end with.
        kinds: what rollout k is like (cyclic): ``(RIGHT, WRONG, WRONG, WRONG)`` is a pass rate of one in four.
        heals_after: from this attempt (another seed) on every response is right.
        faults: of the first sends of each request, in order; then it is answered.
        always: the last fault never ends.
        text: said word for word, in place of what ``kinds`` would say.
    """

    answer: str = ""
    wrong: str = "no idea"
    kinds: tuple[Kind, ...] = (Kind.RIGHT,)
    heals_after: int | None = None
    faults: tuple[Fault, ...] = ()
    always: bool = False
    text: str | None = None

    def kind(self, k: int, attempt: int) -> Kind:
        healed = self.heals_after is not None and attempt >= self.heals_after
        return Kind.RIGHT if healed else self.kinds[k % len(self.kinds)]

    def fault(self, sends: int) -> Fault | None:
        """Of the send after ``sends`` others of the same request."""
        if sends < len(self.faults):
            return self.faults[sends]
        return self.faults[-1] if self.always and self.faults else None


@dataclass(frozen=True)
class Plan:
    """All that a stand-in does.

    Attributes:
        models: name -> record key -> rule. A record without a rule gets ``Rule(answer="0")``.
        latency_s: of every answer.
        slow_s: of a slow one.
        words: length of the reasoning.
        retry_after: what a 429 tells the client to wait, in seconds; None says nothing.
        split_reasoning: put the reasoning into ``reasoning_content``, as vLLM's reasoning parser does.
        api_key: asked for where it is set.
        seed: of the words.
    """

    models: Mapping[str, Mapping[str, Rule]] = field(default_factory=lambda: {"stand-in": {}})
    latency_s: float = 0.0
    slow_s: float = 1.0
    words: int = 120
    retry_after: float | None = 0.0
    split_reasoning: bool = False
    api_key: str | None = None
    seed: int = 0


def respond(plan: Plan, rule: Rule, key: str, k: int, attempt: int, seed: int) -> tuple[str, str]:
    """(text, finish_reason) of a response; the same for the same arguments."""
    kind = rule.kind(k, attempt)
    if rule.text is not None:
        return rule.text, "stop"
    if kind is Kind.EMPTY:
        return "", "stop"
    rng = random.Random(f"{plan.seed}/{key}/{k}/{attempt}/{seed}")
    words = rng.choices(_WORDS, k=plan.words)
    if kind is Kind.REPETITIVE:
        words = (words * (1 + 60 // len(words)))[:60] * 4
    reasoning = " ".join(words)
    if kind is Kind.TRUNCATED:
        return f"{THINK_OPEN}\n{reasoning}", "length"
    if kind is Kind.MALFORMED:
        return f"{THINK_OPEN}\n{reasoning}\n\n<answer>{rule.answer}</answer>", "stop"
    answer = rule.wrong if kind is Kind.WRONG else rule.answer
    solution = " ".join(rng.choices(_WORDS, k=max(8, plan.words // 2)))
    text = f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{solution}\n\n<answer>{answer}</answer>"
    if kind is Kind.FILTERED:
        return text[: len(text) * 2 // 3], "content_filter"
    return text, "stop"


class StandIn:
    """The server's state: the plan and the counts."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sent: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.connections = 0
        self.last_body: dict[str, Any] = {}

    def counts(self) -> dict[str, Any]:
        """Requests by their header value: received, and answered with a completion."""
        counts = {"sent": self.sent, "finished": self.finished, "connections": self.connections}
        return counts | {"last_body": self.last_body}


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as much as clients of completions need."""

    def __init__(self, server: StandIn) -> None:
        self.server, self.plan = server, server.plan
        self.received = b""
        self.need = 0
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        while len(self.received) >= self.need and (end := self.received.find(b"\r\n\r\n")) >= 0:
            lines = self.received[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            self.need = end + 4 + int(headers.get("content-length", 0))
            if len(self.received) < self.need:
                return
            body, self.received = self.received[end + 4 : self.need], self.received[self.need :]
            self.need = 0
            method, path = lines[0].split(" ")[:2]
            self.handle(method, path, headers, body)

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        if path == "/counts":
            self.send_json(200, self.server.counts())
        elif self.plan.api_key and headers.get("authorization") != f"Bearer {self.plan.api_key}":
            self.send_error(401, "Incorrect API key provided.")
        elif (method, path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "owned_by": "r4b"} for name in self.plan.models]
            self.send_json(200, {"object": "list", "data": models})
        elif (method, path) == ("POST", "/v1/chat/completions"):
            self.complete(headers, body)
        else:
            self.send_error(404, "Not Found")

    def complete(self, headers: Mapping[str, str], raw: bytes) -> None:
        try:
            body = json.loads(raw)
            rules = self.plan.models.get(body["model"])
        except (ValueError, KeyError, TypeError):
            return self.send_error(400, "the body is no JSON request")
        if rules is None:
            return self.send_error(404, f"The model `{body['model']}` does not exist.")
        self.server.last_body = body if len(raw) < 1 << 16 else {"model": body["model"]}
        name = headers.get(REQUEST_HEADER.lower()) or hashlib.sha256(raw).hexdigest()
        parts = name.split("/", 3)
        key, k, attempt = (unquote(parts[3]), int(parts[1]), int(parts[2])) if len(parts) == 4 else (name, 0, 0)
        rule = rules.get(key) or Rule(answer="0")
        fault = rule.fault(self.server.sent[name])
        self.server.sent[name] += 1
        delay = self.plan.slow_s if fault is Fault.SLOW else self.plan.latency_s
        if fault is not None and fault is not Fault.SLOW:
            return self.later(delay, lambda: self.fail(fault))
        text, finish = respond(self.plan, rule, key, k, attempt, int(body.get("seed") or 0))
        self.later(delay, lambda: self.send_completion(name, body, text, finish))

    def later(self, delay: float, call: Callable[[], None]) -> None:
        if delay > 0:
            self.loop.call_later(delay, call)
        else:
            call()

    def fail(self, fault: Fault) -> None:
        if fault is Fault.RATE_LIMITED:
            after = self.plan.retry_after
            extra = "" if after is None else f"Retry-After: {after:g}\r\n"
            self.send_error(429, "Rate limit reached, slow down.", extra)
        elif fault in (Fault.SERVER_ERROR, Fault.REFUSED, Fault.UNAUTHORIZED):
            said = {"500": "the engine died", "400": "this request was planned to be refused", "401": "bad API key"}
            self.send_error(int(fault), said[fault])
        elif fault is Fault.DROPPED:
            self.transport.close()
        elif fault is Fault.HTML:
            self.send(200, b"<!DOCTYPE html><html><body><h1>Please sign in</h1></body></html>", "text/html")
        elif fault is Fault.NOT_JSON:
            self.send(200, b'{"choices": [{"message": {"content": "half', "application/json")
        elif fault is Fault.ENORMOUS:
            self.transport.write(_head(200, 1 << 28, "application/json") + b'{"choices": "' + b"x" * (1 << 20))
            self.drip(b"x" * (1 << 20), 0.001)
        elif fault in (Fault.HALF, Fault.DRIP):
            self.transport.write(_head(200, 5000, "application/json") + b'{"choices": [{"message": {')
            if fault is Fault.HALF:
                self.transport.close()
            else:
                self.drip(b" ", 1.0)

    def drip(self, data: bytes, every: float) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)
            self.loop.call_later(every, self.drip, data, every)

    def send_completion(self, name: str, body: Mapping[str, Any], text: str, finish: str) -> None:
        self.server.finished[name] += 1
        message = {"role": "assistant", "content": text}
        if self.plan.split_reasoning and THINK_CLOSE in text:
            reasoning, _, content = text.partition(THINK_CLOSE)
            message |= {"content": content, "reasoning_content": reasoning.removeprefix(THINK_OPEN)}
        prompt, completion = 10, len(text.split())
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        head = {"id": "chatcmpl-0", "created": 0, "model": body["model"]}
        if body.get("stream"):
            return self.send_stream(head, message, finish, usage)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self.send_json(200, head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    def send_stream(self, head: dict[str, Any], message: dict[str, str], finish: str, usage: dict[str, int]) -> None:
        deltas: list[Any] = [{"role": "assistant"}]
        for name in ("reasoning_content", "content"):
            text = message.get(name, "")
            deltas += [{name: text[start : start + 64]} for start in range(0, len(text), 64)]
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
        ]
        chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, {"choices": [], "usage": usage}]
        lines = [json.dumps(head | {"object": "chat.completion.chunk"} | chunk) for chunk in chunks]
        events = "".join(f"data: {line}\n\n" for line in (*lines, "[DONE]")).encode()
        self.send(200, events, "text/event-stream")

    def send_json(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode(), "application/json")

    def send_error(self, status: int, message: str, extra: str = "") -> None:
        self.send(status, json.dumps({"error": {"message": message}}).encode(), "application/json", extra)

    def send(self, status: int, body: bytes, kind: str, extra: str = "") -> None:
        self.transport.write(_head(status, len(body), kind, extra) + body)


def _head(status: int, length: int, kind: str, extra: str = "") -> bytes:
    reason = _REASONS.get(status, "Error")
    return f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


class Running:
    """A stand-in in a process of its own; it ends with this object, or with the process that started it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def counts(self) -> dict[str, Any]:
        """`StandIn.counts` of the server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counts", timeout=10) as reply:
            return json.load(reply)

    def close(self) -> None:
        """End the server."""
        if self.process.stdin:
            self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(plan: Plan, port: int = 0) -> Running:
    """Start a stand-in in a process of its own on a loopback port; 0 takes a free one.

    Raises:
        ValueError: if it cannot listen there.
    """
    here = Path(__file__).resolve()
    process = subprocess.Popen(
        [sys.executable, "-P", str(here), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(here.parents[3])},
        start_new_session=True,  # Ctrl-C is for whoever started it
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line.strip().isdigit():
        process.kill()
        said = process.stderr.read().decode().strip().splitlines()
        raise ValueError(f"the stand-in cannot serve on port {port}: {said[-1] if said else 'it ended at once'}")
    process.stderr.close()
    return Running(process, int(line))


def _read_plan(line: str) -> Plan:
    data = json.loads(line)
    models = {
        name: {
            key: Rule(**rule | {"kinds": tuple(map(Kind, rule["kinds"])), "faults": tuple(map(Fault, rule["faults"]))})
            for key, rule in rules.items()
        }
        for name, rules in data.pop("models").items()
    }
    return Plan(models=models, **data)


def _read_rule(rule: dict[str, Any]) -> Rule:
    kinds, faults = tuple(map(Kind, rule["kinds"])), tuple(map(Fault, rule["faults"]))
    return Rule(**rule | {"kinds": kinds, "faults": faults})


async def _run(plan: Plan, port: int) -> None:
    """Serve until standard input ends: a server outlives nobody who started it, however that ended."""
    loop = asyncio.get_running_loop()
    server = StandIn(plan)
    listening = await loop.create_server(lambda: _Connection(server), "127.0.0.1", port, backlog=4096)
    print(listening.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()

    def read_input() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            loop.remove_reader(sys.stdin.fileno())
            ended.set()

    loop.add_reader(sys.stdin.fileno(), read_input)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_run(_read_plan(sys.stdin.readline()), int(sys.argv[1])))
