"""Which endpoint is asked, when none is, and when the stage has to stop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from r4b_core.curate.endpoints import (
    CallSettings,
    Endpoint,
    EndpointError,
    EndpointSettings,
    Failure,
    Pool,
    TryFailed,
    backoff,
)

CALLS = CallSettings(backoff_s=0.002, max_backoff_s=0.01, outage_s=0.2)


class Probe:
    """Answers as told: a failure by address, or none."""

    def __init__(self) -> None:
        self.failures: dict[str, Failure] = {}
        self.count: Counter[str] = Counter()

    async def __call__(self, endpoint: Endpoint) -> None:
        self.count[endpoint.url] += 1
        if failure := self.failures.get(endpoint.url):
            raise TryFailed(failure, "as told")


def endpoints(count: int, **settings: Any) -> list[Endpoint]:
    return [Endpoint(EndpointSettings(url=f"http://host{index}:8000/v1", **settings), None) for index in range(count)]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_weights_and_limits_share_the_requests() -> None:
    async def check() -> None:
        few, many = endpoints(2)
        many.settings = EndpointSettings(url=many.url, weight=3)
        pool = Pool([few, many], CALLS, Probe())
        taken = Counter([(await pool.acquire()).url for _ in range(40)])
        assert taken == {few.url: 10, many.url: 30}
        few.settings = EndpointSettings(url=few.url, concurrency=10)
        assert [(await pool.acquire()).url for _ in range(8)] == [many.url] * 8

    run(check())


def test_a_full_endpoint_serves_in_turn() -> None:
    async def check() -> None:
        (endpoint,) = endpoints(1, concurrency=2)
        pool, order = Pool([endpoint], CALLS, Probe()), []

        async def use(number: int) -> None:
            taken = await pool.acquire()
            assert endpoint.in_flight <= 2
            order.append(number)
            await asyncio.sleep(0)
            pool.release(taken)

        await asyncio.gather(*(use(number) for number in range(50)))
        assert order == list(range(50)) and endpoint.in_flight == 0

    run(check())


def test_who_comes_later_waits_behind_those_who_wait() -> None:
    async def check() -> None:
        (endpoint,) = endpoints(1, concurrency=2)
        pool, order = Pool([endpoint], CALLS.model_copy(update={"outage_s": 5}), Probe()), []

        async def use(number: int) -> None:
            taken = await pool.acquire()
            order.append(number)
            await asyncio.sleep(0.001)
            pool.release(taken)

        tasks = [asyncio.ensure_future(use(number)) for number in range(10)]
        for number in range(10, 40):
            await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(use(number)))
        for _ in range(5):
            pool.failed(endpoint, Failure.CONNECTION, "reset", None)  # opens, and is found in order again
        pool.failed(endpoint, Failure.RATE_LIMITED, "slow down", 0.02)
        await asyncio.gather(*tasks)
        assert order == list(range(40))
        await pool.close()

    run(check())


def test_nobody_waits_while_there_is_room() -> None:
    async def check() -> None:
        (endpoint,) = endpoints(1, concurrency=2)
        pool = Pool([endpoint], CALLS, Probe())
        for _ in range(2):
            await pool.acquire()
        waiter = asyncio.ensure_future(pool.acquire())
        await asyncio.sleep(0)
        late = asyncio.ensure_future(pool.acquire())  # it comes between the waking of the waiter and its turn
        pool.release(endpoint)
        pool.release(endpoint)
        assert await asyncio.wait_for(asyncio.gather(waiter, late), 1) == [endpoint, endpoint]

    run(check())


def test_a_cancelled_waiter_passes_its_turn_on() -> None:
    async def check() -> None:
        (endpoint,) = endpoints(1, concurrency=1)
        pool = Pool([endpoint], CALLS, Probe())
        await pool.acquire()
        first, second = (asyncio.ensure_future(pool.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        pool.release(endpoint)
        first.cancel()
        assert await second is endpoint

    run(check())


def test_failures_in_a_row_open_the_breaker_and_a_probe_closes_it() -> None:
    async def check() -> None:
        one, other = endpoints(2)
        probe = Probe()
        pool = Pool([one, other], CALLS, probe)
        probe.failures[one.url] = Failure.CONNECTION
        for _ in range(4):
            pool.failed(one, Failure.CONNECTION, "reset", None)
        assert not one.is_open
        pool.succeeded(one)
        for _ in range(5):
            pool.failed(one, Failure.CONNECTION, "reset", None)
        assert one.is_open
        assert [await pool.acquire() for _ in range(3)] == [other] * 3
        while probe.count[one.url] < 3:
            pool.succeeded(other)
            await asyncio.sleep(0.001)
        assert one.is_open
        probe.failures.clear()
        while one.is_open:
            await asyncio.sleep(0.001)
        assert await pool.acquire() is one
        pool.failed(one, Failure.SERVER_ERROR, "again", None)  # half open: one is enough
        assert one.is_open
        await pool.close()

    run(check())


def test_429_rests_the_endpoint_for_as_long_as_it_asks() -> None:
    async def check() -> None:
        one, other = endpoints(2)
        pool = Pool([one, other], CALLS, Probe())
        pool.failed(one, Failure.RATE_LIMITED, "slow down", 0.05)
        start = time.monotonic()
        assert [await pool.acquire() for _ in range(4)] == [other] * 4
        pool.failed(other, Failure.RATE_LIMITED, "slow down", 5.0)
        assert await pool.acquire() is one
        assert 0.04 <= time.monotonic() - start < 1 and not one.is_open

    run(check())


@pytest.mark.parametrize("failure", [Failure.UNAUTHORIZED, Failure.NOT_JSON])
def test_the_stage_stops_when_every_endpoint_is_hopeless(failure: Failure) -> None:
    async def check() -> None:
        pair, probe, told = endpoints(2), Probe(), []
        pool = Pool(pair, CALLS, probe, told.append)
        for endpoint in pair:
            probe.failures[endpoint.url] = failure
            for _ in range(5):
                pool.failed(endpoint, failure, "as told", None)
        with pytest.raises(EndpointError, match=rf"host0.*{failure}.*as told.*host1") as stopped:
            await pool.acquire()
        assert str(stopped.value) == str(told[0]) and len(told) == 1
        await pool.close()

    run(check())


def test_one_hopeless_endpoint_does_not_stop_the_others() -> None:
    async def check() -> None:
        one, other = endpoints(2)
        pool = Pool([one, other], CALLS, Probe())
        pool.failed(one, Failure.NOT_FOUND, "no such model", None)
        assert [await pool.acquire() for _ in range(3)] == [other] * 3
        pool.failed(other, Failure.NOT_FOUND, "no such model", None)
        with pytest.raises(EndpointError, match="every endpoint refuses"):
            await pool.acquire()

    run(check())


def test_a_long_outage_stops_the_stage() -> None:
    async def check() -> None:
        (one,) = endpoints(1)
        probe = Probe()
        probe.failures[one.url] = Failure.CONNECTION
        pool = Pool([one], CALLS, probe)
        for _ in range(5):
            pool.failed(one, Failure.CONNECTION, "reset", None)
        start = time.monotonic()
        with pytest.raises(EndpointError, match="no endpoint has answered for"):
            await pool.acquire()
        assert time.monotonic() - start >= 0.15
        await pool.close()

    run(check())


def test_start_waits_for_servers_that_load() -> None:
    async def check() -> None:
        one, other = endpoints(2)
        probe = Probe()
        probe.failures |= {one.url: Failure.CONNECTION, other.url: Failure.CONNECTION}
        with pytest.raises(EndpointError, match="no endpoint can be used"):
            await Pool([one, other], CALLS, probe).start()
        waiting = Pool([one, other], CALLS.model_copy(update={"wait_s": 0.1}), probe)
        asyncio.get_running_loop().call_later(0.05, probe.failures.pop, one.url)
        await waiting.start()
        assert await waiting.acquire() is one and other.is_open
        await waiting.close()

    run(check())


def test_backoff_grows_is_capped_and_repeats() -> None:
    calls = CallSettings(backoff_s=1.0, max_backoff_s=10.0)
    waits = [backoff(calls, "a", tries) for tries in range(1, 40)]
    assert waits == [backoff(calls, "a", tries) for tries in range(1, 40)]
    assert all(min(10.0, 2.0**index) / 2 <= wait <= min(10.0, 2.0**index) for index, wait in enumerate(waits))
    assert len({backoff(calls, str(name), 1) for name in range(100)}) == 100


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "an address such as"),
        ({"url": "ftp://host/v1"}, "an address such as"),
        ({"url": "http://me:secret@host/v1"}, "does not belong into the address"),
        ({"url": "http://host/v1?x=1"}, "an address such as"),
        ({"url": "http://host/v1", "api_key_env": "A", "api_key_file": "b"}, "give one of them"),
        ({"url": "http://host/v1", "weight": 0}, "greater than 0"),
        ({"url": "http://host/v1", "speed": 0}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EndpointSettings(**settings)


def test_an_address_alone_will_do() -> None:
    assert EndpointSettings.model_validate("https://host:1/v1/").url == "https://host:1/v1"


def test_keys_come_from_the_named_place_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text(" sk-1 \n")
    assert EndpointSettings(url="http://host/v1", api_key_file=str(path)).api_key() == "sk-1"
    monkeypatch.setenv("TEACHER_KEY", "sk-2")
    settings = EndpointSettings(url="http://host/v1", api_key_env="TEACHER_KEY")
    assert settings.api_key() == "sk-2"
    endpoint = Endpoint(settings, "sk-2", failure=Failure.UNAUTHORIZED, detail="bad key")
    assert "sk-2" not in f"{endpoint.describe()} {settings!r} {endpoint!r}"
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ValueError, match="TEACHER_KEY.*not set or empty"):
        settings.api_key()
    path.write_text("sk-1\nsk-2\n")
    with pytest.raises(ValueError, match="more than a key") as wrong:
        EndpointSettings(url="http://host/v1", api_key_file=str(path)).api_key()
    assert "sk-1" not in str(wrong.value)
    with pytest.raises(ValueError, match="cannot be read"):
        EndpointSettings(url="http://host/v1", api_key_file=str(tmp_path / "none")).api_key()
