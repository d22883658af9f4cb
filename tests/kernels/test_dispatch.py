"""dispatch: the choice, the refusal, and what the errors say."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from r4b_kernels import BackendError, dispatch

CPU = torch.device("cpu")


class Picky:
    """A backend that serves float32 alone."""

    @staticmethod
    def refuses(x: Tensor) -> str | None:
        return None if x.dtype == torch.float32 else f"takes float32, not {x.dtype}"


class Willing:
    pass


@pytest.fixture
def op() -> Iterator[str]:
    dispatch.register("an_op", "gpu", "no.such.module:Backend", dispatch.only_on("cuda"))
    dispatch.register("an_op", "picky", f"{__name__}:Picky", dispatch.only_on("cpu"))
    dispatch.register("an_op", "willing", Willing)
    yield "an_op"
    del dispatch._OPS["an_op"]
    dispatch._CHOSEN.pop(("an_op", "cpu"), None)
    dispatch._REFUSED.clear()


def test_the_first_that_can_is_chosen_and_logged_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "r4b_kernels"):
        chosen = {dispatch.resolve(op, CPU, None, torch.zeros(1)) for _ in range(3)}
    assert [x.__name__ for x in chosen] == ["Picky"]
    assert [record.getMessage() for record in caplog.records] == ["an_op on cpu: picky"]


def test_a_refused_input_goes_to_the_next_with_one_warning(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "r4b_kernels"):
        for _ in range(3):
            assert dispatch.resolve(op, CPU, None, torch.zeros(1, dtype=torch.float64)) is Willing
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "an_op on cpu: willing instead of picky: takes float32, not torch.float64"


def test_a_named_backend_that_cannot_is_an_error_that_says_what_can(op: str) -> None:
    with pytest.raises(BackendError, match="'gpu' cannot serve.*runs on cuda, the input is on cpu; can: picky, willin"):
        dispatch.resolve(op, CPU, "gpu", torch.zeros(1))
    with pytest.raises(BackendError, match="'picky' cannot serve.*takes float32, not torch.float64; can: willing"):
        dispatch.resolve(op, CPU, "picky", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(BackendError, match="'fast' does not exist; there are gpu, picky, willing"):
        dispatch.resolve(op, CPU, "fast", torch.zeros(1))


def test_on_another_gpu_than_the_current_one_it_is_made_current(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU: with two of them, an input on the other would be read from the wrong one."""
    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        yield
        current.pop()

    class Launcher:
        @staticmethod
        def forward(x: Tensor) -> tuple[Tensor, int]:
            return x, current[-1]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    dispatch.register(op, "launcher", Launcher)
    dispatch.register(op, "function", Launcher.forward)
    x = torch.zeros(1)
    for index in (0, 1):
        on = torch.device("cuda", index)
        assert dispatch.resolve(op, on, "launcher", x).forward(x) == (x, index)
        assert dispatch.resolve(op, on, "function", x)(x) == (x, index)
        assert current == [0]
    assert dispatch.resolve(op, torch.device("cuda", 0), "launcher", x) is Launcher


def test_nothing_that_can_is_an_error() -> None:
    dispatch.register("lonely", "picky", Picky)
    try:
        with pytest.raises(BackendError, match="'picky' cannot serve.*; can: none"):
            dispatch.resolve("lonely", CPU, None, torch.zeros(1, dtype=torch.float64))
    finally:
        del dispatch._OPS["lonely"], dispatch._CHOSEN["lonely", "cpu"]


def test_the_table_says_why_not(op: str) -> None:
    rows = [(backend, reason) for name, backend, reason in dispatch.table("cpu") if name == op]
    assert rows == [("gpu", "runs on cuda, the input is on cpu"), ("picky", "chosen"), ("willing", "")]


@pytest.mark.skipif(dispatch.interpreting(), reason="under the interpreter Triton does serve the CPU")
def test_triton_says_what_it_needs() -> None:
    reason = dispatch.where_triton_runs(CPU) or ""
    assert reason.startswith(("runs on cuda (and on the CPU where TRITON_INTERPRET=1)", "triton is not installed"))
