"""What is sent and how replies are read, against a server of the test's own that shows every byte."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from r4b_core.curate.client import (
    Answer,
    Background,
    ChatMany,
    ChatRequest,
    _retry_after,
    open_chat,
    open_client,
    seed_of,
)
from r4b_core.curate.demo.standin import Fault, Rule, serve
from r4b_core.curate.endpoints import EndpointError, Failure, TryFailed
from r4b_core.curate.templates import BARE, Template, load_template
from r4b_core.curate.wire import EventReader, Prompt, Reply, ServedModel, data_url, read_completion
from r4b_core.data.images import open_image
from tests.curate.served import QUICK, picture, plan, rules, served

COMPLETION = {
    "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3},
}
MODELS = {"data": [{"id": "stand-in"}]}


def reply(value: Any, status: str = "200 OK", kind: str = "application/json", extra: str = "") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


class Recorder:
    """Serves given bytes, one reply per request, and keeps the requests as they came."""

    def __init__(self, replies: list[bytes]) -> None:
        self.requests: list[bytes] = []
        self._replies = iter(replies)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except OSError:
            return

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            while request := self._read(connection):
                self.requests.append(request)
                is_probe = request.startswith(b"GET /v1/models")
                answer = reply(MODELS) if is_probe else next(self._replies, b"")
                if not answer:
                    return
                connection.sendall(answer)

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (piece := connection.recv(65536)):
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self._listener.close()


@contextmanager
def recorder(*replies: bytes) -> Iterator[Recorder]:
    made = Recorder(list(replies))
    try:
        yield made
    finally:
        made.close()


def ask(model: ServedModel, prompt: Prompt | None = None, count: int = 1) -> list[Answer]:
    prompt = prompt or Prompt(BARE, "What is 3 + 1?", [])
    requests = [ChatRequest("generate", f"set/{number}", prompt, 7 + number) for number in range(count)]
    with Background() as background, open_client(model, "generate.teacher", background) as client:
        return ChatMany(background, client)(requests)


def test_the_bytes_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-1")
    image = picture()
    with recorder(reply(COMPLETION)) as server:
        model = ServedModel(
            model="stand-in",
            endpoints=[{"url": server.url, "api_key_env": "TEACHER_KEY"}],
            temperature=0.7,
            top_p=0.9,
            top_k=20,
            max_tokens=99,
            thinking="on",
            system="Be exact.",
            extra={"repetition_penalty": 1.05, "chat_template_kwargs": {"tools": False}},
            calls=QUICK,
        )
        prompt = Prompt(Template("t", "Solve:\n{question}\nEnd."), "<image>What is <think>3</think>\u00b2?", [image])
        with Background() as background, open_client(model, "generate.teacher", background) as client:
            request = ChatRequest("generate", "a set/\u00e9 1", prompt, seed=123, k=2, attempt=1)
            (answer,) = ChatMany(background, client)([request])
    assert (answer.text, answer.finish_reason, answer.tokens, answer.prompt_tokens) == ("4", "stop", 3, 9)
    probe, sent = server.requests
    head, _, body = sent.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer sk-1" and b"Bearer sk-1" in probe
    assert headers["x-r4b-request"] == "generate/2/1/a%20set/%C3%A9%201"
    assert headers["content-type"] == "application/json" and headers["accept-encoding"] == "identity"
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Solve:\nWhat is < think>3< /think>\u00b2?\nEnd."},
    ]
    expected = {
        "model": "stand-in",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 99,
        "seed": 123,
        "stream": False,
        "repetition_penalty": 1.05,
        "chat_template_kwargs": {"tools": False, "enable_thinking": True},
        "messages": [{"role": "system", "content": "Be exact."}, {"role": "user", "content": content}],
    }
    assert body == json.dumps(expected).encode()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({}, None),
        ({"thinking": "on"}, {"enable_thinking": True}),
        ({"thinking": False}, {"enable_thinking": False}),
        ({"thinking": "on", "thinking_flag": "thinking_mode"}, {"thinking_mode": "long"}),
        ({"thinking": "off", "thinking_flag": "thinking_mode"}, {"thinking_mode": "short"}),
        ({"thinking": "auto", "thinking_flag": "thinking_mode"}, {"thinking_mode": "auto"}),
    ],
)
def test_the_thinking_flag_is_sent(settings: dict[str, Any], flag: dict[str, Any] | None) -> None:
    body = json.loads(ServedModel(model="m", **settings).body(1, "[]"))
    assert body.get("chat_template_kwargs") == flag
    assert "top_k" not in body and body["seed"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"thinking": "auto"}, "thinking_flag: thinking_mode"),
        ({"extra": {"seed": 1}}, "has a setting of its own"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"endpoints": ["host"]}, "an address such as"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServedModel(model="m", **settings)


def test_connections_are_kept_and_bounded() -> None:
    with serve(plan(latency_s=0.002)) as server:
        model = served(server.url)
        assert all(answer.whole for answer in ask(model, count=300))
        assert server.counts()["connections"] <= 16 + 3  # and those of the probe and of the counts


def test_two_endpoints_share_by_weight_and_one_may_die() -> None:
    with serve(plan(latency_s=0.1)) as light, serve(plan(latency_s=0.1)) as heavy:
        model = ServedModel(
            model="stand-in",
            endpoints=[{"url": light.url}, {"url": heavy.url, "weight": 3}],
            calls=QUICK.model_copy(update={"tries": 8}),
        )
        prompt = Prompt(BARE, "1 + 1", [])
        with Background() as background, open_client(model, "generate.teacher", background) as client:
            many = ChatMany(background, client)
            requests = [ChatRequest("generate", str(number), prompt, number) for number in range(400)]
            assert all(answer.whole for answer in many(requests[:200]))
            shares = [sum(server.counts()["sent"].values()) for server in (light, heavy)]
            assert sum(shares) == 200 and shares[0] < shares[1]
            heavy.close()
            assert all(answer.whole for answer in many(requests[200:]))


def test_retry_after_is_obeyed() -> None:
    table = {"set/0": Rule(faults=(Fault.RATE_LIMITED,))}
    with serve(plan({"stand-in": table}, retry_after=0.3)) as server:
        start = time.monotonic()
        (answer,) = ask(served(server.url))
        assert answer.whole and time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("7", 7), ("0.5", 0.5), ("-3", 0), ("1e9", 600), ("nan", None), ("soon", None)],
)
def test_retry_after_is_read(value: str | None, seconds: float | None) -> None:
    assert _retry_after(value) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < (_retry_after(date) or 0) <= 30


def test_hung_servers_cost_the_total_timeout() -> None:
    table = {"set/0": Rule(faults=(Fault.HUNG,))}
    with serve(plan({"stand-in": table})) as server:
        start = time.monotonic()
        calls = QUICK.model_copy(update={"total_timeout_s": 0.3})
        (answer,) = ask(served(server.url, calls=calls))
        assert answer.whole and 0.3 <= time.monotonic() - start < 3


@pytest.mark.parametrize("split", [False, True])
def test_streamed_and_whole_replies_are_the_same(split: bool) -> None:
    with serve(plan({"stand-in": rules(0)}, split_reasoning=split)) as server:
        whole = ask(served(server.url), count=3)
        streamed = ask(served(server.url, calls=QUICK.model_copy(update={"stream": True})), count=3)
    assert whole == streamed and all(answer.whole and answer.tokens for answer in whole)
    assert all(answer.text.startswith("<think>\n") and answer.text.count("</think>") == 1 for answer in whole)


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    events = b'data: {"choices": [{"delta": {"content": "half"}, "finish_reason": null}]}\n\n'
    cut = reply(events, kind="text/event-stream")
    with recorder(*[cut] * 9) as server:
        (answer,) = ask(served(server.url, calls=QUICK.model_copy(update={"stream": True})))
    assert answer.failure is Failure.CONNECTION and "ended before" in answer.detail and not answer.text


@pytest.mark.parametrize(
    ("bad", "failure", "words"),
    [
        (reply({"error": {"message": "too long"}}, "400 Bad Request"), Failure.REFUSED, "HTTP 400: too long"),
        (reply({"detail": "bad field"}, "422 Unprocessable"), Failure.REFUSED, "bad field"),
        (reply(b"<html>gateway</html>", "502 Bad Gateway", "text/html"), Failure.SERVER_ERROR, "HTTP 502.*gateway"),
        (reply({"choices": []}), Failure.NOT_JSON, "no chat completion"),
        (reply({"choices": [{"message": {"content": 5}}]}), Failure.NOT_JSON, "no chat completion"),
        (reply(b"[" * 100_000), Failure.NOT_JSON, "no chat completion"),
        (reply(b"", "302 Found", extra="Location: http://elsewhere/\r\n"), Failure.NOT_JSON, "redirect to http://else"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Failure.CONNECTION, "."),
        (reply(b'{"choices"')[:-3], Failure.TIMEOUT, "not a byte"),
        (reply(b"x" * (1 << 21)), Failure.TOO_LARGE, "max_reply_mb"),
    ],
)
def test_what_is_no_answer_is_a_failure_of_its_class(bad: bytes, failure: Failure, words: str) -> None:
    import re

    with recorder(*[bad] * 9) as server:
        (answer,) = ask(served(server.url, calls=QUICK.model_copy(update={"tries": 2, "idle_timeout_s": 0.1})))
    assert answer.failure is failure and re.search(words, answer.detail), answer


def test_a_good_answer_under_a_wrong_content_type_is_taken() -> None:
    with recorder(reply(COMPLETION, kind="text/plain")) as server:
        assert ask(served(server.url))[0].text == "4"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://no-such-host.invalid/v1", "no endpoint can be used.*no-such-host.invalid.*cannot connect: "),
        ("http://127.0.0.1:9/v1", "no endpoint can be used.*connection"),
    ],
)
def test_nobody_there_is_one_clear_error(url: str, words: str) -> None:
    with pytest.raises(EndpointError, match=f"generate.teacher: {words}"):
        ask(served(url))


def test_no_endpoint_at_all_is_said_before_anything_starts() -> None:
    with pytest.raises(EndpointError, match=r"generate.teacher.endpoints is empty.*http://host:8000/v1"):
        ask(ServedModel(model="m"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(b"<html>Sign in</html>", kind="text/html"), "no JSON reply.*OpenAI-compatible server"),
        (reply({"error": "no"}, "401 Unauthorized"), "unauthorized.*api_key_env"),
        (reply(b"<html>nginx</html>", "404 Not Found", "text/html"), "no such model.*nginx"),
    ],
)
def test_a_wrong_address_is_noticed_at_the_start(answer: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.curate.test_client.MODELS", None)
    with recorder() as server:
        monkeypatch.setattr("tests.curate.test_client.reply", lambda value: answer)
        with pytest.raises(EndpointError, match=words):
            ask(served(server.url))
    assert len(server.requests) == 1


def test_results_come_in_order_whatever_finishes_first() -> None:
    table = {
        f"set/{number}": Rule(answer=str(number), faults=(Fault.SLOW,) if number % 5 == 0 else ())
        for number in range(40)
    }
    with serve(plan({"stand-in": table}, slow_s=0.05)) as server:
        texts = [answer.text for answer in ask(served(server.url), count=40)]
    assert [text.partition("<answer>")[2].partition("<")[0] for text in texts] == [str(number) for number in range(40)]


def test_no_more_than_the_window_is_under_way() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    async def double(item: int) -> int:
        return 2 * item

    with Background() as background:
        for done, (item, result) in enumerate(background.ordered(double, items(), window=7), 1):
            assert item == done and result == 2 * item and taken <= done + 7


def test_a_judge_is_asked_through_a_journal(tmp_path: Any) -> None:
    prompt = Prompt(BARE, "Are 1/2 and 0.5 the same?", [])
    requests = [ChatRequest("verify", f"set/{number}", prompt, 0) for number in range(3)]
    with serve(plan({"judge": {"set/1": Rule(text="DIFFERENT")}})) as server:
        for _ in range(2):
            with open_chat(served(server.url, "judge"), "verify.judge", tmp_path / "verdicts.jsonl") as chat:
                assert chat(requests)[1].text == "DIFFERENT"
        assert set(server.counts()["sent"].values()) == {1}


def test_seeds_differ_by_record_rollout_and_attempt() -> None:
    seeds = {seed_of(0, key, k, attempt) for key in ("a", "b") for k in range(8) for attempt in range(3)}
    assert len(seeds) == 48 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a") == seed_of(0, "a") != seed_of(1, "a")


@pytest.mark.parametrize(
    ("content", "reasoning", "finish", "thinking", "expected"),
    [
        ("\n\n4", "\n3 + 1\n", "stop", "default", "<think>\n3 + 1\n</think>\n\n4"),
        ("", "3 +", "length", "default", "<think>\n3 +"),
        ("4 is", "3 + 1", "length", "default", "<think>\n3 + 1\n</think>\n\n4 is"),
        ("<think>\n3 + 1\n</think>\n\n4", "", "stop", "default", "<think>\n3 + 1\n</think>\n\n4"),
        ("3 + 1\n</think>\n\n4", "", "stop", "default", "<think>\n3 + 1\n</think>\n\n4"),
        ("3 +", "", "length", "on", "<think>\n3 +"),
        ("4", "", "stop", "off", "<think>\n\n</think>\n\n4"),
        ("4", "", "stop", "default", "4"),
    ],
)
def test_the_response_begins_with_its_reasoning(
    content: str, reasoning: str, finish: str, thinking: str, expected: str
) -> None:
    assert Reply(content, reasoning, finish, 1, 1).response(thinking) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_split_off_reasoning_is_found(name: str) -> None:
    message = {"content": None, name: "because"}
    found = read_completion(json.dumps({"choices": [{"message": message, "finish_reason": "length"}]}).encode())
    assert (found.content, found.reasoning, found.finish_reason, found.tokens) == ("", "because", "length", None)


def test_lone_surrogates_and_odd_counts_do_no_harm() -> None:
    raw = b'{"choices": [{"message": {"content": "a\\ud800b"}}], "usage": {"completion_tokens": "many"}}'
    found = read_completion(raw)
    assert found.content == "a?b" and found.finish_reason == "none" and found.tokens is None


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_may_come_in_any_pieces(size: int) -> None:
    data = (
        b': comment\r\ndata: {"choices": [{"delta": {"reasoning": "b\xc3\xa9"}}]}\r\n\r\n'
        b'data: {"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    )
    reader = EventReader()
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    assert reader.done and reader.finish() == Reply("4", "b\u00e9", "stop", 2, None)


def test_an_error_in_a_stream_is_the_servers() -> None:
    with pytest.raises(TryFailed, match="server error.*out of memory"):
        EventReader().feed(b'data: {"error": {"message": "out of memory"}}\n\n')


def test_images_are_sent_as_they_are_or_as_training_sees_them() -> None:
    plain = picture(100, 60, "JPEG", quality=80)
    assert data_url(plain, 2048, 32, 90) == f"data:image/jpeg;base64,{base64.b64encode(plain).decode()}"
    turned, turned_png = (picture(64, 40, kind, exif=_orientation(6)) for kind in ("JPEG", "PNG"))
    clear = io.BytesIO()
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(clear, "PNG")
    for data, size in (
        (picture(3000, 100), (2048, 68)),
        (picture(400, 10), (400, 32)),
        (turned, (40, 64)),
        (turned_png, (40, 64)),
    ):
        sent = _sent(data)
        assert (sent.shape[1], sent.shape[0]) == size
    assert _sent(clear.getvalue()).min() > 250  # transparent is white, as `open_image` has it
    np.testing.assert_allclose(_sent(turned).mean(), open_image(turned).mean(), atol=2)


def _orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def _sent(data: bytes) -> np.ndarray:
    kind, _, text = data_url(data, 2048, 32, 90).partition(";base64,")
    assert kind == "data:image/jpeg"
    return open_image(base64.b64decode(text))


def test_images_go_where_the_question_has_them() -> None:
    first, second = picture(40, 40), picture(50, 50)
    template = Template("t", "Solve. {question} Done.")

    def shape(question: str, images: list[bytes]) -> list[str]:
        content = json.loads(Prompt(template, question, images).messages(ServedModel(model="m")))[0]["content"]
        if isinstance(content, str):
            return [content]
        return [part["text"] if part["type"] == "text" else "image" for part in content]

    assert shape("Same?", []) == ["Solve. Same? Done."]
    assert shape("<image>word?", []) == ["Solve. < image>word? Done."]
    assert shape("Same?", [first, second]) == ["image", "image", "Solve. Same? Done."]
    assert shape("<image>\n<image>Same?", [first, second])[:2] == ["image", "image"]
    assert shape("Is <image> like <image>?", [first, second]) == ["Solve. Is ", "image", " like ", "image", "? Done."]


def test_templates_ship_and_are_checked(tmp_path: Any) -> None:
    distill = load_template("distill")
    assert all(phase in distill.text for phase in ("Extract", "Set up", "Solve", "Validate", "<answer>"))
    assert load_template("caption", asks=False).around[1] == ""
    own = tmp_path / "own.txt"
    for text, words in (("no question", "it does 0 times"), ("{question} {question}", "it does 2"), ("<image>", "0")):
        own.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_template(str(own))
    own.write_text("Say {question} {curly}")
    assert load_template(str(own)).around == ("Say ", " {curly}")
    with pytest.raises(ValueError, match="distill, .*score, .*bare"):
        load_template("distil")
