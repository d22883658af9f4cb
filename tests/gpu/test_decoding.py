"""What a decode step of the embedded engine calls, on a GPU: decode_attention and draw_tokens, at a 4B's shapes.

Run and rehearsed as test_kernels.py is. Neither may wait for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_kernels import decode_attention, dispatch, draw_tokens
from tests.kernels.decode_cases import CACHES, as_dtype, error, make_case, run
from tests.kernels.head_cases import assert_no_worse

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Rows per prompt, s, D, P, M, Hk. Of the second case the prompts are no whole vectors and the heads are padded.
CASES = (
    [((8, 0, 16, 5, 1), 4, 128, 2104, 1032, 8), ((3, 8), 7, 72, 333, 65, 2)]
    if ON_GPU
    else [((3, 0, 1), 4, 32, 24, 16, 1), ((2,), 7, 24, 33, 7, 1)]
)
SIZE = (64, 151936) if ON_GPU else (3, 5000)

pytestmark = pytest.mark.gpu


def inputs_of(case: tuple[Any, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(DEVICE) for name, x in as_dtype(make_case(*case), dtype).items()}


@contextlib.contextmanager
def not_waiting() -> Iterator[None]:
    """On a GPU: what waits for the device is an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="the CPU has backends of its own")
@pytest.mark.parametrize("op", ["decode_attention", "draw_tokens"])
def test_a_gpu_is_served_by_triton(op: str) -> None:
    assert (op, "triton", "chosen") in dispatch.table(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_in_float32(case: tuple[Any, ...]) -> None:
    inputs = inputs_of(case, torch.float64)
    exact = run(inputs, "reference")
    for backend in ("triton", "torch"):
        assert max(error(run(as_dtype(inputs, torch.float32), backend), exact).values()) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_in_bfloat16_is_no_worse_than_torch(case: tuple[Any, ...]) -> None:
    inputs = inputs_of(case, torch.bfloat16)
    exact = run(as_dtype(inputs, torch.float64), "reference")
    ours, again = (run(inputs, "triton") for _ in range(2))
    # In the rehearsal's few elements luck decides.
    assert_no_worse(ours, run(inputs, "torch"), exact, factor=1.5 if ON_GPU else 3.0)
    assert all(torch.equal(x, again[name]) for name, x in ours.items())


@pytest.mark.skipif(not ON_GPU, reason="the interpreter multiplies with the host's BLAS, which rounds by place")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_does_not_depend_on_the_others_to_the_bit(dtype: torch.dtype) -> None:
    inputs = inputs_of(CASES[0], dtype)
    whole = run(inputs, "triton")["out"]
    row, prompt = 11, 2
    one = dict(inputs, offsets=torch.tensor([0, 1], device=DEVICE), column=inputs["column"][row : row + 1])
    one["prompt_lengths"], one["mixed"] = inputs["prompt_lengths"][prompt : prompt + 1], inputs["mixed"][row : row + 1]
    for name in ("rope", *CACHES):
        one[name] = inputs[name][:, row : row + 1].contiguous()
    for name in ("prompt_keys", "prompt_values"):
        one[name] = inputs[name][:, prompt : prompt + 1].contiguous()
    assert torch.equal(run(one, "triton")["out"][0], whole[row])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    inputs = inputs_of(CASES[0], torch.bfloat16)
    logits, point = torch.randn(2, 100, device=DEVICE), torch.rand(2, dtype=torch.float64, device=DEVICE)
    calls: list[Callable[[], Any]] = [lambda: decode_attention(**inputs, backend=backend)]
    calls += [lambda top_p=top_p: draw_tokens(logits, point, top_p=top_p, backend=backend) for top_p in (1.0, 0.9)]
    for call in calls:
        call()  # compiles
        with not_waiting():
            call()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (0.0, 1.0)])
def test_draw_tokens(temperature: float, top_p: float, backend: str) -> None:
    """The definition's token in float64, or the one at a point a millionth away: so far rounding moves an edge."""
    torch.manual_seed(0)
    rows, _ = SIZE
    logits = 3 * torch.randn(SIZE, device=DEVICE)
    logits[:, :5] += 12.0
    point = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    forced = torch.full((rows,), -1, device=DEVICE)
    forced[1] = 17
    options = {"temperature": temperature, "top_p": top_p}

    def exact(at: Tensor) -> tuple[Tensor, ...]:
        return draw_tokens(logits.double(), at.clamp(0, 1 - 2**-53), forced, **options, backend="reference")

    token, logprob, entropy = draw_tokens(logits, point, forced, **options, backend=backend)
    assert (exact(point - 1e-6)[0] <= token).all() and (token <= exact(point + 1e-6)[0]).all()
    expected = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact(point)[2], rtol=1e-5, atol=1e-5)
    again = draw_tokens(logits, point, forced, **options, backend=backend)
    if backend == "triton":
        assert all(torch.equal(a, b) for a, b in zip((token, logprob, entropy), again, strict=True))
