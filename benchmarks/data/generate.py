"""Requests per second of `r4b curate generate` against a server that answers after 50 ms, next to other clients.

    r4b bench data generate

The server is the stand-in in a process of its own (r4b_core/curate/demo/standin.py), on the same two cores. ``limit``
is what it can do: a load generator that sends ready bytes and does not look at what comes back. ``ours`` is the whole
stage: prompt from template, question and image, body, retries, answer read and written to the journal, record made. The
rivals send the same messages and read the answer, no more: `openai`'s AsyncOpenAI with as many requests under way, and
one request after the other, which is how MMFineReason's published pipeline asks. ``image`` adds a JPEG of 24 kB.
The best of five turns counts, since both sides share two cores with whatever else runs there.

Requests per second, 2026-11-20, AMD EPYC, 2 cores shared with the server and with other jobs, Python 3.11, aiohttp
3.14.5, openai 3.52.0, 256 requests under way, commit 5315ea6:

=====  =====  =====  ======  ===================  =====================================
case   limit  ours   openai  one after the other  ours, processor time per request (us)
=====  =====  =====  ======  ===================  =====================================
text   4,546  3,156     516                   19                                    190
image  4,459  2,025     413                   19                                    340
=====  =====  =====  ======  ===================  =====================================

256 requests of 50 ms are 5,120 per second at most. Half of our time is aiohttp's; with images it is their encoding, and
the server's reading of it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from r4b_core.curate.client import Background
from r4b_core.curate.demo.standin import Plan, Running, serve
from r4b_core.curate.generate import GenerateSettings, open_generate
from r4b_core.curate.journal import Journal
from r4b_core.curate.templates import load_template
from r4b_core.curate.wire import Prompt, ServedModel
from r4b_core.data.records import Record

LATENCY_S = 0.05
CONCURRENCY = 256
REQUESTS = {"limit": 4000, "ours": 4000, "openai": 1000, "one after the other": 20}
TURNS = 5


@pytest.fixture
def server() -> Iterator[Running]:
    with serve(Plan(latency_s=LATENCY_S)) as running:
        yield running


def rows(count: int, image: bytes | None) -> list[Record]:
    images = [] if image is None else [image]
    return [Record(str(number), "sums", f"What is {number} + 1?", images, answer="?") for number in range(count)]


def bodies(count: int, image: bytes | None) -> Iterator[bytes]:
    model, template = ServedModel(model="stand-in"), load_template("distill")
    for number, row in enumerate(rows(count, image)):
        yield model.body(number, Prompt(template, row.question, row.images).messages(model))


def photograph() -> bytes:
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize((320, 214)).save(file, "JPEG", quality=90)
    return file.getvalue()


class _Load(asyncio.Protocol):
    """Sends a ready request whenever the reply to the one before has come."""

    def __init__(self, requests: Iterator[bytes], done: Callable[[], None]) -> None:
        self.requests, self.done, self.received, self.need = requests, done, 0, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def data_received(self, data: bytes) -> None:
        if not self.need:
            head = data.index(b"\r\n\r\n") + 4
            self.need = head + int(data[:head].split(b"Content-Length: ")[1].split(b"\r\n")[0])
        self.received += len(data)
        if self.received >= self.need:
            self.received = self.need = 0
            self.send()

    def send(self) -> None:
        if (request := next(self.requests, None)) is None:
            self.transport.close()
            self.done()
        else:
            self.transport.write(request)


def load(server: Running, ready: Sequence[bytes]) -> None:
    """What the server can do at most."""
    route = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-R4B-Request: load/0/0/"
    requests = (
        f"{route}{number}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body for number, body in enumerate(ready)
    )

    async def run() -> None:
        loop, ended, left = asyncio.get_running_loop(), asyncio.Event(), CONCURRENCY

        def done() -> None:
            nonlocal left
            left -= 1
            if not left:
                ended.set()

        for _ in range(CONCURRENCY):
            await loop.create_connection(lambda: _Load(requests, done), "127.0.0.1", server.port)
        await ended.wait()

    asyncio.run(run())


def ours(server: Running, records: list[Record]) -> None:
    endpoint = {"url": server.url, "concurrency": CONCURRENCY}
    settings = GenerateSettings(teacher=ServedModel.model_validate({"model": "stand-in", "endpoints": [endpoint]}))
    with tempfile.TemporaryDirectory() as folder, Background() as background:
        with Journal(Path(folder, "journal")) as journal, open_generate(settings, background, journal) as stage:
            outcome = stage(records)
    assert len(outcome.kept) == len(records) and all(record.finish_reason == "stop" for record in outcome.kept)


def openai_client(server: Running, ready: Iterable[bytes]) -> None:
    from openai import AsyncOpenAI

    async def run() -> None:
        requests = iter(ready)
        async with AsyncOpenAI(base_url=server.url, api_key="-") as client:

            async def work() -> None:
                for request in requests:
                    reply = await client.chat.completions.create(**json.loads(request))
                    assert reply.choices[0].finish_reason == "stop"

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))

    asyncio.run(run())


def one_after_the_other(server: Running, ready: Iterable[bytes]) -> None:
    for body in ready:
        request = urllib.request.Request(f"{server.url}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", ["text", "image"])
def test_generate(kind: str, benchmark: Any, server: Running) -> None:
    image = photograph() if kind == "image" else None
    ready = list(bodies(REQUESTS["limit"], image))
    records = rows(REQUESTS["ours"], image)
    ways: dict[str, Callable[[], None]] = {
        "limit": lambda: load(server, ready),
        "ours": lambda: ours(server, records),
        "openai": lambda: openai_client(server, ready[: REQUESTS["openai"]]),
        "one after the other": lambda: one_after_the_other(server, ready[: REQUESTS["one after the other"]]),
    }
    skipped = {}
    if importlib.util.find_spec("openai") is None:
        skipped["openai"] = "not installed"
        del ways["openai"]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: list[float] = []
    for _ in range(TURNS):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            seconds[name].append((time.perf_counter() - start) / REQUESTS[name])
            if name == "ours":
                processor.append((time.process_time() - busy) / REQUESTS[name])
    best = {name: min(times) for name, times in seconds.items()}  # other jobs can but slow a turn down
    rate = {name: 1 / each for name, each in best.items()}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        ours=best.pop("ours"),
        rivals=best,
        skipped=skipped,
        requests_per_second=rate,
        processor_seconds=statistics.median(processor),
        concurrency=CONCURRENCY,
        latency_seconds=LATENCY_S,
        image_bytes=len(image or b""),
    )
    shown = ", ".join(f"{name} {each:,.0f}" for name, each in rate.items())
    print(f"\n{kind}: requests/s {shown}; ours {1e6 * statistics.median(processor):.0f} us of processor per request")
