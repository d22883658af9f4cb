"""Which endpoint takes the next request: weights, health and back-off.

Each endpoint has a circuit breaker. Failures in a row open it: nothing is sent until the back-off is over, then a probe
(``GET /models``) decides whether it closes. An endpoint that says 429 is left alone for as long as it asks. When every
endpoint is hopeless (no access, no OpenAI-compatible server, no such model), or none has answered for long, the stage
stops with one error.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from r4b_core.config.recipe import Settings

logger = logging.getLogger(__name__)
_BREAKER = 5  # failures in a row
_HOPELESS_PROBES = 3
_SECONDS_BETWEEN_WARNINGS = 60.0


class EndpointError(ValueError):
    """No request can be made any more: names each endpoint, what it said and the way out."""


class Failure(StrEnum):
    """Why a try failed; these words are also the reasons that records are dropped for."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server error"
    RATE_LIMITED = "rate limited"
    UNAUTHORIZED = "unauthorized"
    NOT_JSON = "no JSON reply"
    TOO_LARGE = "reply too large"
    NOT_FOUND = "no such model"
    REFUSED = "request refused"
    UNSENDABLE = "request cannot be made"


# Of the server, not of the request: trying again, or elsewhere, may help.
TRANSIENT = frozenset(
    {Failure.CONNECTION, Failure.TIMEOUT, Failure.SERVER_ERROR, Failure.RATE_LIMITED, Failure.UNAUTHORIZED}
    | {Failure.NOT_JSON, Failure.NOT_FOUND}
)
# Waiting does not help when every endpoint is like this.
_HOPELESS = frozenset({Failure.UNAUTHORIZED, Failure.NOT_JSON, Failure.NOT_FOUND})
_ADVICE = {
    Failure.UNAUTHORIZED: "check api_key_env or api_key_file of the endpoint",
    Failure.NOT_FOUND: "set model to a name that the server lists, and let the address end as its routes begin (/v1)",
    Failure.NOT_JSON: "give the address of an OpenAI-compatible server, such as http://host:8000/v1",
}


class TryFailed(Exception):
    """One try of a request failed.

    Attributes:
        failure: its class.
        detail: the server's or the system's words.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(self, failure: Failure, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure, self.detail, self.retry_after = failure, detail, retry_after


class EndpointSettings(Settings):
    """One OpenAI-compatible server. In YAML its address alone will do."""

    url: str = Field(description="such as http://host:8000/v1")
    weight: float = Field(1.0, gt=0, description="share of the requests, relative to the other endpoints")
    concurrency: int = Field(256, ge=1, description="requests under way at once")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    api_key_file: str | None = Field(None, description="file that holds the key")

    @model_validator(mode="before")
    @classmethod
    def _from_address(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("an address such as http://host:8000/v1 is needed")
        if parts.username or parts.password:
            raise ValueError("a key does not belong into the address: use api_key_env or api_key_file")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_key(self) -> EndpointSettings:
        if self.api_key_env and self.api_key_file:
            raise ValueError("api_key_env and api_key_file are both set: give one of them")
        return self

    def api_key(self) -> str | None:
        """The key, or None where the endpoint needs none. It is never logged.

        Raises:
            ValueError: if the variable or the file is missing or empty, or holds more than a key.
        """
        if self.api_key_env:
            where, key = f"api_key_env = {self.api_key_env!r}", os.environ.get(self.api_key_env, "").strip()
        elif self.api_key_file:
            where = f"api_key_file = {self.api_key_file!r}"
            try:
                key = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"endpoint {self.url}: {where} cannot be read ({error})") from None
        else:
            return None
        if not key:
            raise ValueError(f"endpoint {self.url}: {where} is not set or empty: put the key there")
        if not key.isascii() or any(character.isspace() for character in key):
            raise ValueError(f"endpoint {self.url}: {where} holds more than a key: one line of ASCII is needed")
        return key


class CallSettings(Settings):
    """How requests are made: it changes when answers come, not what they say."""

    connect_timeout_s: float = Field(10.0, gt=0)
    total_timeout_s: float = Field(3600.0, gt=0, description="of one request, from sending to the last byte")
    idle_timeout_s: float = Field(120.0, gt=0, description="without a byte once the reply has begun")
    tries: int = Field(8, ge=1, description="sends of a request that fails for the server's sake; 429 counts apart")
    backoff_s: float = Field(0.5, ge=0, description="wait before the second try; doubles with every other")
    max_backoff_s: float = Field(60.0, gt=0)
    outage_s: float = Field(1800.0, gt=0, description="the stage stops when no endpoint has answered for so long")
    wait_s: float = Field(0.0, ge=0, description="wait at the start for servers that still load their weights")
    max_reply_mb: float = Field(32.0, gt=0, description="a longer reply is not read to its end")
    stream: bool = Field(False, description="ask for server-sent events: hung servers are noticed by idle_timeout_s")


def backoff(calls: CallSettings, identity: str, tries: int) -> float:
    """Seconds to wait after ``tries`` failed tries: exponential, capped, with a jitter that ``identity`` decides."""
    seconds = min(calls.max_backoff_s, calls.backoff_s * 2.0 ** min(tries - 1, 30))
    digest = hashlib.blake2b(f"{identity}/{tries}".encode(errors="replace"), digest_size=4).digest()
    return seconds * (0.5 + 0.5 * int.from_bytes(digest) / 2**32)


@dataclass
class Endpoint:
    """One server and its health. Times are the event loop's."""

    settings: EndpointSettings
    key: str | None = field(repr=False)
    in_flight: int = 0
    failures: int = 0
    openings: int = 0
    is_open: bool = False
    paused_until: float = 0.0
    last_alive: float = 0.0
    last_warning: float = -_SECONDS_BETWEEN_WARNINGS
    has_answered: bool = False
    is_hopeless: bool = False
    failure: Failure | None = None
    detail: str = ""
    serves: str = ""

    @property
    def url(self) -> str:
        return self.settings.url

    def describe(self) -> str:
        """The address and the last failure, with the advice for its kind."""
        advice = f"; {_ADVICE[self.failure]}" if self.failure in _ADVICE else ""
        serves = f"; it serves {self.serves}" if self.failure is Failure.NOT_FOUND and self.serves else ""
        return f"{self.url}: {self.failure or 'no reply'} ({self.detail}){serves}{advice}"


class Pool:
    """The endpoints of one model. All calls come from one event loop.

    Args:
        probe: raises `TryFailed` unless an endpoint is in order.
        on_stop: is told why the stage has to stop.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        calls: CallSettings,
        probe: Callable[[Endpoint], Awaitable[None]],
        on_stop: Callable[[EndpointError], None] = lambda error: None,
    ) -> None:
        self.endpoints, self.calls, self._probe, self._on_stop = list(endpoints), calls, probe, on_stop
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # a heap
        self._tickets = self._woken = 0
        self._probing: set[asyncio.Task[None]] = set()
        self._stopped: EndpointError | None = None
        for endpoint in self.endpoints:
            endpoint.last_alive = self._loop.time()

    async def start(self) -> None:
        """Probe every endpoint; go on once one is in order.

        Raises:
            EndpointError: if none is, after ``wait_s``.
        """
        until = self._loop.time() + self.calls.wait_s
        while True:
            ready = await asyncio.gather(*(self._is_ready(endpoint) for endpoint in self.endpoints))
            if any(ready):
                break
            hopeless = all(endpoint.failure in _HOPELESS for endpoint in self.endpoints)
            if hopeless or self._loop.time() >= until:
                raise self._error("no endpoint can be used")
            await asyncio.sleep(min(2.0, self.calls.wait_s))
        for endpoint, is_ready in zip(self.endpoints, ready, strict=True):
            endpoint.last_alive = self._loop.time()
            if not is_ready:
                self._open(endpoint)

    async def acquire(self) -> Endpoint:
        """The least loaded endpoint for its weight, once one is free. First come, first served.

        Raises:
            EndpointError: when the stage has to stop.
        """
        self._tickets += 1
        ticket = self._tickets
        is_next = not self._waiting and not self._woken
        while True:
            if self._stopped:
                raise EndpointError(str(self._stopped))
            if is_next and (endpoint := self._choose()) is not None:
                endpoint.in_flight += 1
                if self._waiting and not self._woken:
                    self._wake_all()  # whoever came while this one was being woken
                return endpoint
            waiter: asyncio.Future[None] = self._loop.create_future()
            heapq.heappush(self._waiting, (ticket, waiter))
            try:
                await waiter
                is_next = True
            except asyncio.CancelledError:
                if not waiter.cancelled():
                    self._wake(1)
                raise
            finally:
                self._woken -= waiter.done() and not waiter.cancelled()

    def release(self, endpoint: Endpoint) -> None:
        """The request that `acquire` gave the endpoint for is over."""
        endpoint.in_flight -= 1
        self._wake(1)

    def succeeded(self, endpoint: Endpoint) -> None:
        """It gave an answer, or refused a single request by good arguments."""
        endpoint.failures = endpoint.openings = 0
        endpoint.has_answered = True
        endpoint.last_alive = self._loop.time()

    def failed(self, endpoint: Endpoint, failure: Failure, detail: str, retry_after: float | None) -> None:
        """A try failed for the endpoint's sake."""
        endpoint.failure, endpoint.detail = failure, detail
        if failure is Failure.RATE_LIMITED:
            endpoint.last_alive = self._loop.time()
            if retry_after:
                endpoint.paused_until = max(endpoint.paused_until, self._loop.time() + retry_after)
                self._loop.call_later(retry_after, self._wake_all)
            return
        endpoint.failures += 1
        if endpoint.is_open:
            return
        if failure is Failure.NOT_FOUND:  # before its first answer: it has no such model for any request
            endpoint.is_open = True
            self._give_up(endpoint)
        elif endpoint.failures >= _BREAKER:
            self._open(endpoint)

    def stop(self, error: EndpointError) -> None:
        """Give this error to all who wait, and to all who come."""
        if self._stopped is None:
            self._stopped = error
            self._on_stop(error)
        self._wake(len(self._waiting))

    async def close(self) -> None:
        """End the probes."""
        for task in self._probing:
            task.cancel()
        await asyncio.gather(*self._probing, return_exceptions=True)

    def _choose(self) -> Endpoint | None:
        free = [endpoint for endpoint in self.endpoints if self._room(endpoint) > 0]
        return min(free, key=lambda endpoint: (endpoint.in_flight + 1) / endpoint.settings.weight, default=None)

    def _room(self, endpoint: Endpoint) -> int:
        """How many requests more it may have."""
        if endpoint.is_open or endpoint.paused_until > self._loop.time():
            return 0
        return endpoint.settings.concurrency - endpoint.in_flight

    def _wake(self, number: int) -> None:
        """Let so many waiters look again."""
        while self._waiting and number > 0:
            _, waiter = heapq.heappop(self._waiting)
            if not waiter.done():
                waiter.set_result(None)
                self._woken += 1
                number -= 1

    def _wake_all(self) -> None:
        """Let as many waiters look again as there is room for."""
        self._wake(sum(max(0, self._room(endpoint)) for endpoint in self.endpoints))

    def _open(self, endpoint: Endpoint) -> None:
        """Send nothing until a probe succeeds."""
        endpoint.is_open = True
        now = self._loop.time()
        if now - endpoint.last_warning >= _SECONDS_BETWEEN_WARNINGS:
            endpoint.last_warning = now
            logger.warning("%s: nothing is sent there until it answers again", endpoint.describe())
        task = self._loop.create_task(self._reopen(endpoint))
        self._probing.add(task)
        task.add_done_callback(self._probing.discard)

    async def _reopen(self, endpoint: Endpoint) -> None:
        while True:
            endpoint.openings += 1
            await asyncio.sleep(backoff(self.calls, endpoint.url, endpoint.openings))
            if await self._is_ready(endpoint):
                break
            if endpoint.failure in _HOPELESS and endpoint.openings >= _HOPELESS_PROBES:
                self._give_up(endpoint)
            self._stop_if_out()
        logger.info("%s answers again", endpoint.url)
        # Half open: one more failure opens it again.
        endpoint.is_open, endpoint.is_hopeless, endpoint.failures = False, False, _BREAKER - 1
        self._wake_all()

    async def _is_ready(self, endpoint: Endpoint) -> bool:
        try:
            await self._probe(endpoint)
        except TryFailed as failed:
            endpoint.failure, endpoint.detail = failed.failure, failed.detail
            return False
        return True

    def _give_up(self, endpoint: Endpoint) -> None:
        """Stop where no endpoint is left to hope for."""
        endpoint.is_hopeless = True
        if all(other.is_hopeless for other in self.endpoints):
            self.stop(self._error("every endpoint refuses"))

    def _stop_if_out(self) -> None:
        silent = self._loop.time() - max(endpoint.last_alive for endpoint in self.endpoints)
        if silent >= self.calls.outage_s:
            self.stop(self._error(f"no endpoint has answered for {silent:.0f} s (outage_s)"))

    def _error(self, what: str) -> EndpointError:
        said = "; ".join(endpoint.describe() for endpoint in self.endpoints)
        return EndpointError(f"{what}: {said}. Answers received are in the journal: mend it and start again to go on")
