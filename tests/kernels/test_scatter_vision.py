from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import BackendError, scatter_vision

NAMES = ("out", "grad_embeddings", "grad_features")
# index, number of feature rows
INDEXES = {
    "two_images": (torch.tensor([-1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7, 8, -1]), 9),
    "backwards": (torch.arange(40).flip(0), 40),
    "reused": (torch.tensor([*range(20), -1, *range(20), -1, *range(10, 20)]), 25),
    "reused_scattered": (torch.tensor([i * 7 % 5 - 1 for i in range(129)]), 4),
    "all_text": (torch.full((63,), -1), 3),
    "all_image": (torch.arange(64), 64),
    "no_features": (torch.full((5,), -1), 0),
    "no_tokens": (torch.empty(0, dtype=torch.int64), 3),
}


def tensors(index: Tensor, rows: int, dtype: torch.dtype, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (len(index), rows, len(index))]
    return [x.to(dtype).requires_grad_() for x in values]


def run(inputs: list[Tensor], index: Tensor, accumulate: bool, backend: str | None = None) -> dict[str, Tensor]:
    out = scatter_vision(*inputs[:2], index, accumulate=accumulate, backend=backend)
    grads = torch.autograd.grad(out, inputs[:2], inputs[2].detach(), allow_unused=True)
    return dict(zip(NAMES, (out, *grads), strict=True))


def by_token(inputs: list[Tensor], index: Tensor, accumulate: bool) -> dict[str, Tensor]:
    """The definition, one token at a time."""
    embeddings, features, grad = (x.detach() for x in inputs)
    out, grad_embeddings, grad_features = embeddings.clone(), grad.clone(), torch.zeros_like(features)
    for token, row in enumerate(index.tolist()):
        if row >= 0:
            out[token] = features[row] + (embeddings[token] if accumulate else 0)
            grad_features[row] += grad[token]
            if not accumulate:
                grad_embeddings[token] = 0
    return dict(zip(NAMES, (out, grad_embeddings, grad_features), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", INDEXES)
def test_backends_are_the_definition(name: str, dtype: torch.dtype, accumulate: bool, backend: str) -> None:
    index, rows = INDEXES[name]
    inputs = tensors(index, rows, torch.float64)
    mine, truth = run(inputs, index.to(dtype), accumulate, backend), by_token(inputs, index, accumulate)
    for key, value in truth.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", INDEXES)
def test_cpu_is_the_reference_in_float32_and_bfloat16(name: str, accumulate: bool) -> None:
    index, rows = INDEXES[name]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
        inputs = tensors(index, rows, dtype)
        truth = run([x.detach().double().requires_grad_() for x in inputs], index, accumulate, "reference")
        for key, value in run(inputs, index, accumulate, "cpu").items():
            assert value.dtype == dtype
            if value.numel():
                # One rounding of the exact sum, however many tokens share a row.
                assert ((value - truth[key]).abs() <= tolerance * truth[key].abs() + 1e-6).all(), key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["reused", "reused_scattered", "two_images"])
def test_gradcheck(name: str, accumulate: bool, backend: str) -> None:
    index, rows = INDEXES[name]
    leaves = tensors(index, rows, torch.float64)[:2]
    assert torch.autograd.gradcheck(
        lambda *x: scatter_vision(*x, index, accumulate=accumulate, backend=backend), leaves, fast_mode=True
    )


def test_bit_repeatable_on_several_threads() -> None:
    index, rows = INDEXES["reused_scattered"]
    inputs = tensors(index, rows, torch.float32, width=256)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = (run(inputs, index, accumulate=True) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_result_is_new_memory() -> None:
    index, rows = INDEXES["all_text"]
    embeddings, features, _ = (x.detach() for x in tensors(index, rows, torch.float32))
    for backend in ("cpu", "reference"):
        assert scatter_vision(embeddings, features, index, backend=backend).data_ptr() != embeddings.data_ptr()


def test_features_need_not_be_contiguous() -> None:
    index, rows = INDEXES["two_images"]
    embeddings, features, _ = (x.detach() for x in tensors(index, rows, torch.float32))
    torch.testing.assert_close(
        scatter_vision(embeddings.T.contiguous().T, features.T.contiguous().T, index),
        scatter_vision(embeddings, features, index),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck(accumulate: bool) -> None:
    index, rows = INDEXES["reused"]
    embeddings, features, grad = tensors(index, rows, torch.float32)
    torch.library.opcheck(torch.ops.r4b_kernels.scatter_vision.default, (embeddings, features, index, accumulate, None))
    torch.library.opcheck(
        torch.ops.r4b_kernels.scatter_vision_backward.default, (grad.detach(), index, rows, accumulate, None)
    )


@pytest.mark.parametrize("accumulate", [False, True])
def test_compile_fullgraph(accumulate: bool) -> None:
    index, rows = INDEXES["reused"]
    *leaves, grad = tensors(index, rows, torch.float32)

    def step(embeddings: Tensor, features: Tensor) -> Tensor:
        return scatter_vision(embeddings * 2, features, index, accumulate=accumulate).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grad),
        torch.autograd.grad(step(*leaves), leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(8)}, "embeddings is"),
        ({"features": torch.zeros(3, 5)}, "features has shape"),
        ({"features": torch.zeros(3, 4).double()}, "features is torch.float64"),
        ({"index": torch.zeros(7, dtype=torch.int64)}, r"index is .*\[8\]"),
        ({"index": torch.zeros(8)}, "index is torch.float32"),
        ({"index": torch.full((8,), 3)}, r"index holds 3: .* 0 \.\. 2"),
        ({"index": torch.full((8,), -2)}, "index holds -2"),
        ({"index": torch.full((8,), -2), "backend": "reference"}, "index must be"),
        ({"features": torch.zeros(3, 4, device="meta")}, "features is on meta"),
        ({"backend": "triton"}, "triton.*cpu.*reference"),
    ],
)
def test_user_errors(change: dict, message: str) -> None:
    good = {"embeddings": torch.zeros(8, 4), "features": torch.zeros(3, 4), "index": torch.full((8,), -1)}
    with pytest.raises(ValueError, match=message) as caught:
        scatter_vision(**{**good, **change})
    assert isinstance(caught.value, BackendError) == (change.get("backend") == "triton")
