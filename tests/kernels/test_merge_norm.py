"""merge_norm against torch's LayerNorm and a reshape, against transformers' patch merger, and at its edges."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r4b_kernels import BackendError, merge_norm
from tests.kernels.head_cases import assert_close, assert_no_worse, results_and_gradients

BACKENDS = ["cpu", "reference"]
# P, C, merge
SHAPES = [(4, 6, 4), (12, 5, 3), (1, 3, 1), (130, 33, 1), (64, 72, 4), (0, 8, 4), (7, 16, 7)]


def make(
    patches: int, width: int, merge: int, norm_merged: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    span = merge * width if norm_merged else width
    inputs = 2 * torch.randn(patches, width) + 1, torch.randn(span), torch.randn(span)
    return tuple(x.to(dtype) for x in inputs), [torch.randn(patches // merge, merge * width).double()]  # type: ignore[return-value]


def composed(merge: int, norm_merged: bool = False, order: Tensor | None = None, eps: float = 1e-6) -> Callable:
    """What models write."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        merged = x.shape[0] // merge, merge * x.shape[1]
        x = x if order is None else x[order]
        x = x.reshape(merged) if norm_merged else x
        return F.layer_norm(x, x.shape[1:], weight, bias, eps).reshape(merged)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("norm_merged", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_torch(shape: tuple[int, int, int], norm_merged: bool, ordered: bool, backend: str) -> None:
    inputs, seeds = make(*shape, norm_merged)
    kwargs = {"merge": shape[2], "norm_merged": norm_merged, "order": torch.randperm(shape[0]) if ordered else None}
    ours = results_and_gradients(functools.partial(merge_norm, **kwargs, backend=backend), inputs, seeds)
    assert_close(ours, results_and_gradients(composed(**kwargs), inputs, seeds), 1e-12)


def test_order_merges_blocks_of_a_raster() -> None:
    """A 4 x 6 raster in blocks of 2 x 2: the row of a block holds its patches in raster order."""
    x = torch.randn(24, 5)
    order = torch.arange(24).view(2, 2, 3, 2).transpose(1, 2).flatten()
    y = merge_norm(x, torch.ones(5), torch.zeros(5), order=order).view(2, 3, 2, 2, 5)
    raster = F.layer_norm(x, (5,), eps=1e-6).view(4, 6, 5)
    for row in range(2):
        for column in range(3):
            block = raster[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(y[row, column], block)


def test_float32_is_accurate() -> None:
    for norm_merged in (False, True):
        inputs, seeds = make(120, 96, 4, norm_merged, torch.float32)
        ours = results_and_gradients(functools.partial(merge_norm, norm_merged=norm_merged), inputs, seeds)
        exact = results_and_gradients(composed(4, norm_merged), [x.double() for x in inputs], seeds)
        assert_close(ours, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_merged", [False, True])
def test_half_precision_is_no_worse_than_torch(norm_merged: bool, backend: str, dtype: torch.dtype) -> None:
    inputs, seeds = make(120, 96, 4, norm_merged, dtype)
    seeds = [seeds[0].to(dtype).double()]
    ours = results_and_gradients(functools.partial(merge_norm, norm_merged=norm_merged, backend=backend), inputs, seeds)
    rival = results_and_gradients(composed(4, norm_merged), inputs, seeds)
    exact = results_and_gradients(composed(4, norm_merged), [x.double() for x in inputs], seeds)
    assert_no_worse(ours, rival, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_may_have_a_dtype_of_their_own(backend: str) -> None:
    inputs, seeds = make(8, 16, 4)
    for x_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        mixed = inputs[0].to(x_dtype), inputs[1].to(dtype), inputs[2].to(dtype)
        ours = results_and_gradients(functools.partial(merge_norm, backend=backend), mixed, seeds)
        assert [value.dtype for value in ours.values()] == [x_dtype, x_dtype, dtype, dtype]
        exact = results_and_gradients(composed(4), [x.double() for x in mixed], seeds)
        assert_close(ours, exact, 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("postshuffle", [False, True])
def test_is_the_norm_of_transformers_patch_merger(postshuffle: bool, dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    configuration = pytest.importorskip("transformers.models.qwen3_vl.configuration_qwen3_vl")
    config = configuration.Qwen3VLVisionConfig(hidden_size=24, out_hidden_size=20, spatial_merge_size=2)
    merger = modeling.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=postshuffle).to(dtype)
    torch.nn.init.normal_(merger.norm.weight)
    torch.nn.init.normal_(merger.norm.bias)
    x = torch.randn(32, 24).to(dtype)
    seen: list[Tensor] = []
    merger.linear_fc1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    merger(x)
    ours = merge_norm(x, merger.norm.weight, merger.norm.bias, merge=4, norm_merged=postshuffle, eps=merger.norm.eps)
    torch.testing.assert_close(ours, seen[0], rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_merged", [False, True])
def test_gradcheck(norm_merged: bool, backend: str) -> None:
    inputs, _ = make(6, 5, 3, norm_merged)
    call = functools.partial(
        merge_norm, merge=3, norm_merged=norm_merged, order=torch.randperm(6), eps=0.1, backend=backend
    )
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_strides() -> None:
    inputs, seeds = make(8, 12, 4)
    order = torch.stack([torch.randperm(8)] * 2, -1)[:, 0]

    def strided(function: Callable) -> Callable:
        return lambda x, weight, bias: function(x[:, ::2], weight[::2], bias[::2])

    seeds = [seeds[0][:, ::2]]
    ours = results_and_gradients(strided(functools.partial(merge_norm, order=order)), inputs, seeds)
    assert_close(ours, results_and_gradients(strided(composed(4, order=order)), inputs, seeds), 1e-12)


def test_constant_patches_and_repeatability() -> None:
    inputs, seeds = make(400, 64, 4, dtype=torch.float32)
    inputs[0][5] = 3.0
    runs = [results_and_gradients(merge_norm, inputs, seeds) for _ in range(2)]
    torch.testing.assert_close(runs[0]["output 0"].view(400, 64)[5], inputs[2], rtol=0, atol=1e-3)
    for name, value in runs[0].items():
        assert bool(value.isfinite().all()) and torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("norm_merged", [False, True])
def test_operator_contract(norm_merged: bool, ordered: bool) -> None:
    inputs, _ = make(8, 6, 4, norm_merged)
    order = torch.randperm(8) if ordered else None
    for leaves in (inputs, [x.clone().requires_grad_() for x in inputs]):
        for backend in BACKENDS:
            torch.library.opcheck(torch.ops.r4b_kernels.merge_norm.default, (*leaves, order, 4, 1e-6, backend))


@pytest.mark.parametrize("norm_merged", [False, True])
def test_compiles_without_graph_breaks(norm_merged: bool) -> None:
    inputs, seeds = make(8, 6, 4, norm_merged)
    kwargs = {"norm_merged": norm_merged, "order": torch.randperm(8)}
    compiled = torch.compile(functools.partial(merge_norm, **kwargs), backend="aot_eager", fullgraph=True)
    ours = results_and_gradients(compiled, inputs, seeds)
    assert_close(ours, results_and_gradients(composed(4, **kwargs), inputs, seeds), 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 4)}, "x must be"),
        ({"x": torch.zeros(8, 4, dtype=torch.int32)}, "x must be .* it is torch.int32"),
        ({"x": torch.zeros(8, 0)}, "C >= 1"),
        ({"x": torch.zeros(6, 4)}, "merge=4 .*P=6"),
        ({"merge": 0}, "merge=0"),
        ({"weight": torch.zeros(16)}, r"weight must be .*\[4\]"),
        ({"norm_merged": True}, r"weight must be .*\[16\]"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"bias": torch.zeros(4).double()}, "bias is torch.float64"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta"),
        ({"order": torch.arange(8, dtype=torch.int32)}, "order must be int64"),
        ({"order": torch.arange(7)}, r"order must be int64 \[P=8\]"),
        ({"order": torch.arange(8) + 1}, "order holds 1 .. 8"),
        ({"order": torch.arange(8) - 1}, "order holds -1 .. 6"),
        ({"order": torch.zeros(8, dtype=torch.int64)}, "order names patch 0 8 times"),
        ({"order": torch.zeros(8, dtype=torch.int64), "backend": "reference"}, "order names patch 0 8 times"),
        ({"eps": 0.0}, "eps=0"),
        ({"backend": "triton"}, "triton.*cpu.*reference"),
    ],
)
def test_user_errors(change: dict, message: str) -> None:
    good = {"x": torch.zeros(8, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message) as caught:
        merge_norm(**{**good, **change})
    assert isinstance(caught.value, BackendError) == (change.get("backend") == "triton")
