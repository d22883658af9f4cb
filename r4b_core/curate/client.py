"""An asynchronous client of OpenAI-compatible chat completions: concurrent, journaled, and patient with servers.

`Background` runs an event loop in a thread of its own; `ChatClient` asks one served model from there. A stage gives
`Background.ordered` a coroutine per record and gets the results in the order of the records.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import gc
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from urllib.parse import quote

import aiohttp

from r4b_core.curate.endpoints import TRANSIENT, Endpoint, EndpointError, Failure, Pool, TryFailed, backoff
from r4b_core.curate.journal import Journal, JournalError
from r4b_core.curate.wire import STOP, EventReader, Prompt, Reply, ServedModel, read_completion, server_words, shorten

REQUEST_HEADER = "X-R4B-Request"
_MAX_RATE_LIMITED = 64  # replies of 429 to one request
_MAX_RETRY_AFTER_S = 600.0
_DOOMED = 20  # failures in a row that end a stage
_HANDED = 64  # items given to the event loop at a time
_LIGHT = 256 * 1024  # bytes of images that are encoded without leaving the event loop
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question to a model.

    Attributes:
        stage: who asks, such as ``generate``.
        key: of the record.
        prompt: what is asked.
        seed: of the sampling; with the settings it is what the journal knows a request by.
        k: number of the rollout.
        attempt: 0, and one more for every answer that was not good enough.
    """

    stage: str
    key: str
    prompt: Prompt
    seed: int
    k: int = 0
    attempt: int = 0

    @property
    def name(self) -> str:
        """``stage/k/attempt/key`` in ASCII, sent along for the server's log."""
        return f"{self.stage}/{self.k}/{self.attempt}/{quote(self.key, errors='replace')[:1024]}"

    def identity(self, fingerprint: str) -> str:
        """32 hex digits of everything that the answer depends on."""
        text = f"{fingerprint}/{self.k}/{self.attempt}/{self.seed}/{self.stage}/{self.key}"
        return hashlib.blake2b(self.prompt.digest + text.encode("utf-8", "replace"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request.

    Attributes:
        text: the response from ``<think>`` on.
        finish_reason: as the server gave it; only ``stop`` is a whole answer.
        tokens, prompt_tokens: the server's counts.
        failure: why there is no answer, or None.
        detail: of the failure, in the server's words.
    """

    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    failure: Failure | None = None
    detail: str = ""

    @property
    def whole(self) -> bool:
        """Whether the model came to its end."""
        return self.failure is None and self.finish_reason == STOP


def seed_of(seed: int, key: str, k: int = 0, attempt: int = 0) -> int:
    """The seed of one request, in [0, 2^31): no two rollouts of a record share one."""
    text = json.dumps([seed, key, k, attempt])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) & 0x7FFFFFFF


class _Slot(Generic[T, R]):
    """An item on its way through the loop."""

    __slots__ = ("item", "task", "result", "error", "is_done")

    def __init__(self, item: T) -> None:
        self.item = item
        self.task: asyncio.Task[R] | None = None
        self.result: R | None = None
        self.error: BaseException | None = None
        self.is_done = False


class Background:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stopped: Exception | None = None
        self._ready = threading.Event()
        self._awaited: _Slot[Any, Any] | None = None
        self._thread = threading.Thread(target=self.loop.run_forever, name="endpoints", daemon=True)
        # The collector would go through all that is imported, again and again: a third of the time of a request.
        gc.freeze()
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """The result of a coroutine that runs in the loop."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def ordered(
        self, function: Callable[[T], Coroutine[Any, Any, R]], items: Iterable[T], window: int
    ) -> Iterator[tuple[T, R]]:
        """(item, result) of every item, in order; at most ``window`` items are under way or waiting for their turn.

        It is called from one thread.

        Raises:
            EndpointError, JournalError: as soon as the stage has to stop.
        """
        coming = iter(items)
        waiting: deque[_Slot[T, R]] = deque()
        try:
            while True:
                # Handing items over one by one would cost more than asking: each wakes the other thread.
                while len(waiting) < window and not (waiting and waiting[0].is_done):
                    batch: list[_Slot[T, R]] = [
                        _Slot(item) for item in islice(coming, min(_HANDED, window - len(waiting)))
                    ]
                    if not batch:
                        break
                    waiting.extend(batch)
                    self.loop.call_soon_threadsafe(self._start, function, batch)
                if not waiting:
                    return
                self._wait_for(waiting[0])
                while waiting and waiting[0].is_done:
                    slot = waiting.popleft()
                    if slot.error is not None:
                        raise slot.error
                    yield slot.item, cast(R, slot.result)
        finally:
            if waiting and not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self._cancel, list(waiting))

    def stop(self, error: Exception) -> None:
        """Let `ordered` end with this error at once."""
        self._stopped = self._stopped or error
        self._ready.set()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        self.run(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        gc.unfreeze()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait_for(self, slot: _Slot[Any, Any]) -> None:
        self._awaited = slot
        while not slot.is_done and self._stopped is None:
            self._ready.wait()
            self._ready.clear()
        if self._stopped is not None:
            raise self._stopped

    def _start(self, function: Callable[[T], Coroutine[Any, Any, R]], slots: Sequence[_Slot[T, R]]) -> None:
        for slot in slots:
            slot.task = self.loop.create_task(function(slot.item))
            slot.task.add_done_callback(partial(self._finish, slot))

    def _finish(self, slot: _Slot[T, R], task: asyncio.Task[R]) -> None:
        if task.cancelled():
            slot.error = concurrent.futures.CancelledError()
        elif (error := task.exception()) is not None:
            slot.error = error
        else:
            slot.result = task.result()
        slot.task, slot.is_done = None, True
        if slot is self._awaited:
            self._ready.set()

    def _cancel(self, slots: Sequence[_Slot[Any, Any]]) -> None:
        for slot in slots:
            if slot.task is not None:
                slot.task.cancel()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_default_executor()


class ChatClient:
    """Asks one served model; lives in the loop of a `Background`. Use `open_client`.

    It connects when it meets the first request that the journal does not answer.
    """

    def __init__(
        self,
        background: Background,
        model: ServedModel,
        section: str,
        journal: Journal | None,
        *,
        retry_refused: bool = False,
    ) -> None:
        self.model, self.section, self.journal = model, section, journal
        self._background, self._retry_refused = background, retry_refused
        self._fingerprint = model.fingerprint()
        self._answered = self._failed_in_a_row = 0
        self._connecting = asyncio.Lock()
        self._refused: str | None = None
        self._session: aiohttp.ClientSession | None = None
        self._pool: Pool | None = None

    async def _connect(self) -> Pool:
        """The endpoints, one of them found in order.

        Raises:
            EndpointError: if no endpoint can be used.
        """
        async with self._connecting:
            if self._refused is not None:
                raise EndpointError(self._refused)
            if self._pool is None:
                try:
                    self._pool = await self._start()
                except ValueError as error:
                    self._refused = f"{self.section}: {error}"
                    stopped = EndpointError(self._refused)
                    self._background.stop(stopped)
                    raise stopped from error
        return self._pool

    async def _start(self) -> Pool:
        calls = self.model.calls
        endpoints = [Endpoint(settings, settings.api_key()) for settings in self.model.endpoints]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=calls.connect_timeout_s),
            headers={"Accept-Encoding": "identity", "User-Agent": "r4b"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        pool = Pool(endpoints, calls, self._probe, self._background.stop)
        await pool.start()
        return pool

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.close()
        if self._session is not None:
            await self._session.close()

    async def ask(self, request: ChatRequest) -> Answer:
        """The answer to a request: from the journal where it has one, else from an endpoint.

        Raises:
            EndpointError: when no endpoint can be used any more.
            JournalError: when the answer cannot be written down.
        """
        identity = request.identity(self._fingerprint)
        if self.journal is not None and (known := self.journal.get(identity)) is not None:
            answer = _from_entry(known)
            if answer.failure is None or not self._retry_refused:
                self._answered += answer.failure is None
                return answer
        answer = await self._ask_endpoints(request, identity)
        # What failed for the server's sake may succeed another time: only what the server decided is final.
        if self.journal is not None and (answer.failure is None or answer.failure is Failure.REFUSED):
            try:
                await self.journal.append(identity, _to_entry(request, answer))
            except JournalError as error:
                self._background.stop(error)
                raise
        return answer

    async def _ask_endpoints(self, request: ChatRequest, identity: str) -> Answer:
        pool = self._pool or await self._connect()
        tries = limited = 0
        body: bytes | None = None
        while True:
            endpoint = await pool.acquire()
            try:
                body = body or await self._body(request)
                reply = await self._try(endpoint, body, request.name)
                pool.succeeded(endpoint)
                self._answered += 1
                self._failed_in_a_row = 0
                text = reply.response(self.model.thinking)
                return Answer(text, reply.finish_reason, reply.tokens, reply.prompt_tokens)
            except TryFailed as failed:
                failure, detail, retry_after = failed.failure, failed.detail, failed.retry_after
                if failure in TRANSIENT:
                    pool.failed(endpoint, failure, detail, retry_after)
                elif failure is Failure.REFUSED:
                    pool.succeeded(endpoint)
            finally:
                pool.release(endpoint)
            limited += failure is Failure.RATE_LIMITED
            tries += failure is not Failure.RATE_LIMITED
            if failure not in TRANSIENT or tries >= self.model.calls.tries or limited >= _MAX_RATE_LIMITED:
                self._count_failure(pool, failure, detail)
                return Answer(failure=failure, detail=detail)
            wait = backoff(self.model.calls, identity, tries + limited)
            await asyncio.sleep(wait if retry_after is None else retry_after)

    def _count_failure(self, pool: Pool, failure: Failure, detail: str) -> None:
        """Stop where every request fails: a stage that drops all its records helps nobody."""
        if failure in (Failure.UNSENDABLE, Failure.TOO_LARGE):
            return
        self._failed_in_a_row += 1
        # A server that has answered before may refuse many records in a row with reason, such as too long ones.
        if self._failed_in_a_row >= _DOOMED and not (failure is Failure.REFUSED and self._answered):
            pool.stop(
                EndpointError(
                    f"{self.section}: {self._failed_in_a_row} requests in a row failed and none succeeded, the "
                    f"last with: {failure} ({detail}). Look at the server and at the settings of the model; answers "
                    "received are in the journal, start again to go on"
                )
            )

    async def _body(self, request: ChatRequest) -> bytes:
        prompt = request.prompt
        try:
            if sum(map(len, prompt.images)) <= _LIGHT:
                messages = prompt.messages(self.model)
            else:
                async with prompt.lock:
                    messages = await asyncio.to_thread(prompt.messages, self.model)
        except ValueError as error:
            raise TryFailed(Failure.UNSENDABLE, str(error)) from error
        return self.model.body(request.seed, messages)

    async def _try(self, endpoint: Endpoint, body: bytes, name: str) -> Reply:
        """Send a request once.

        Raises:
            TryFailed: unless there is a chat completion.
        """
        headers = {"Content-Type": "application/json", REQUEST_HEADER: name}
        stream = self.model.calls.stream
        reader = EventReader() if stream else None
        status, kind, retry_after, raw = await self._send("POST", endpoint, "chat/completions", headers, body, reader)
        if status != 200:
            raise _failure(endpoint, status, kind, retry_after, raw)
        if reader is not None and kind.startswith("text/event-stream"):
            return reader.finish()
        try:
            return read_completion(raw)
        except TryFailed as failed:
            raise TryFailed(failed.failure, f"{kind or 'no content type'}: {failed.detail}") from None

    async def _probe(self, endpoint: Endpoint) -> None:
        """Is an OpenAI-compatible server there? Whether it serves the model, the first request will tell.

        Raises:
            TryFailed: unless it is.
        """
        status, kind, retry_after, raw = await self._send("GET", endpoint, "models", {}, None, None)
        is_json = raw.lstrip()[:1] in (b"{", b"[")
        if status == 500 or (status in (404, 405) and is_json):
            return  # not every server can list its models
        if status != 200:
            raise _failure(endpoint, status, kind, retry_after, raw)
        try:
            names = [str(model["id"]) for model in json.loads(raw)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TryFailed(Failure.NOT_JSON, f"GET models: {kind}: {shorten(raw, 80)}") from None
        endpoint.serves = shorten(", ".join(names))

    async def _send(
        self,
        method: str,
        endpoint: Endpoint,
        route: str,
        headers: dict[str, str],
        body: bytes | None,
        reader: EventReader | None,
    ) -> tuple[int, str, float | None, bytes]:
        """(status, content type, retry-after, body) of a reply; a stream of events goes to the reader instead.

        Raises:
            TryFailed: if there is no reply, or not all of it.
        """
        calls = self.model.calls
        assert self._session is not None
        if endpoint.key:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        total = calls.total_timeout_s if body else min(calls.total_timeout_s, calls.connect_timeout_s + 10)
        try:
            async with asyncio.timeout(total):
                async with self._session.request(
                    method, f"{endpoint.url}/{route}", data=body, headers=headers, allow_redirects=False
                ) as response:
                    kind = response.headers.get("Content-Type", "")
                    retry_after = _retry_after(response.headers.get("Retry-After"))
                    if response.status in range(300, 400):
                        kind = f"redirect to {response.headers.get('Location', 'nowhere')[:200]}"
                    feeds = reader if response.status == 200 and kind.startswith("text/event-stream") else None
                    return response.status, kind, retry_after, await self._read(response, feeds)
        except TimeoutError:
            raise TryFailed(Failure.TIMEOUT, f"no reply in {total:g} s") from None
        except aiohttp.ClientConnectorError as error:
            number, words = error.os_error.errno, error.os_error.strerror or str(error.os_error)
            words = os.strerror(number) if number is not None and number > 0 else words
            raise TryFailed(Failure.CONNECTION, f"cannot connect: {shorten(words)}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TryFailed(Failure.CONNECTION, shorten(str(error) or type(error).__name__)) from error
        except ValueError as error:  # aiohttp on replies that are no HTTP
            raise TryFailed(Failure.NOT_JSON, shorten(str(error))) from error

    async def _read(self, response: aiohttp.ClientResponse, reader: EventReader | None) -> bytes:
        """The body of a reply, bounded in size and in the time without a byte."""
        calls = self.model.calls
        limit = int(calls.max_reply_mb * 2**20)
        if reader is None and response.content.is_eof() and response.content.total_bytes <= limit:
            return await response.read()  # all of it came with the headers
        pieces, size = [], 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(calls.idle_timeout_s) as timer:
                async for piece in response.content.iter_any():
                    timer.reschedule(loop.time() + calls.idle_timeout_s)
                    size += len(piece)
                    if size > limit:
                        response.close()
                        raise TryFailed(Failure.TOO_LARGE, f"more than max_reply_mb = {calls.max_reply_mb:g}")
                    if reader is None:
                        pieces.append(piece)
                        continue
                    reader.feed(piece)
                    if reader.done:
                        break
        except TimeoutError:
            response.close()
            raise TryFailed(Failure.TIMEOUT, f"not a byte for {calls.idle_timeout_s:g} s") from None
        return b"".join(pieces)


@contextmanager
def open_client(
    model: ServedModel,
    section: str,
    background: Background,
    journal: Journal | None = None,
    *,
    retry_refused: bool = False,
) -> Iterator[ChatClient]:
    """A client of a model.

    Args:
        section: of the recipe, for errors.

    Raises:
        EndpointError: if no endpoint is named; that none can be used is found when the first request is made.
    """
    if not model.endpoints:
        raise EndpointError(
            f"{section}.endpoints is empty: start a server of {model.model} and name it, such as "
            f"{section}.endpoints=[http://host:8000/v1]"
        )
    client = ChatClient(background, model, section, journal, retry_refused=retry_refused)
    try:
        yield client
    finally:
        background.run(client.close())


@contextmanager
def open_journal(path: str | Path, background: Background) -> Iterator[Journal]:
    """A journal that is synced in the background."""
    journal = Journal(path)
    syncing = asyncio.run_coroutine_threadsafe(journal.keep_synced(), background.loop)
    try:
        yield journal
    finally:
        syncing.cancel()
        journal.close()


class ChatMany:
    """Asks many requests at once and gives the answers in their order: what a judge is made of."""

    def __init__(self, background: Background, client: ChatClient) -> None:
        self._background, self._client = background, client

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        """Raises:
        EndpointError, JournalError: when the stage has to stop.
        """
        window = window_of(self._client.model)
        return [answer for _, answer in self._background.ordered(self._client.ask, requests, window)]


@contextmanager
def open_chat(model: ServedModel, section: str, journal: str | Path | None = None) -> Iterator[ChatMany]:
    """`ChatMany` on a loop, a journal and a client of its own; see `open_client` and `open_journal`."""
    with Background() as background:
        if journal is None:
            with open_client(model, section, background) as client:
                yield ChatMany(background, client)
        else:
            with open_journal(journal, background) as kept, open_client(model, section, background, kept) as client:
                yield ChatMany(background, client)


def window_of(model: ServedModel) -> int:
    """How many requests may be under way, or done before their turn, so that a slow answer does not idle the rest."""
    return 8 * sum(endpoint.concurrency for endpoint in model.endpoints)


def _failure(endpoint: Endpoint, status: int, kind: str, retry_after: float | None, raw: bytes) -> TryFailed:
    """The class of a reply that is no answer."""
    words = f"HTTP {status}: {server_words(raw, kind)}"
    if status == 429:
        return TryFailed(Failure.RATE_LIMITED, words, retry_after)
    if status in (401, 403, 407):
        return TryFailed(Failure.UNAUTHORIZED, words)
    if status == 408:
        return TryFailed(Failure.TIMEOUT, words, retry_after)
    if status >= 500 or status in (409, 425):
        return TryFailed(Failure.SERVER_ERROR, words, retry_after)
    if status < 400:
        return TryFailed(Failure.NOT_JSON, words)
    if status == 404 and not endpoint.has_answered:
        return TryFailed(Failure.NOT_FOUND, words)
    return TryFailed(Failure.REFUSED, words)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if seconds == seconds else None


def _to_entry(request: ChatRequest, answer: Answer) -> dict[str, Any]:
    entry = {"stage": request.stage, "key": request.key, "k": request.k, "attempt": request.attempt}
    entry |= {"seed": request.seed, "finish_reason": answer.finish_reason, "tokens": answer.tokens}
    entry |= {"prompt_tokens": answer.prompt_tokens, "text": answer.text}
    return entry if answer.failure is None else entry | {"failure": str(answer.failure), "detail": answer.detail}


def _from_entry(entry: dict[str, Any]) -> Answer:
    failure = Failure(entry["failure"]) if entry.get("failure") else None
    return Answer(
        entry["text"], entry["finish_reason"], entry["tokens"], entry["prompt_tokens"], failure, entry.get("detail", "")
    )
