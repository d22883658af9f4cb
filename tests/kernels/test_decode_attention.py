"""decode_attention: every backend against the definition in float64, against causal attention step by step, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from r4b_kernels import PrefixLayout, decode_attention, dispatch, native, prefix_attention, qk_norm_mrope
from r4b_kernels.decode_attention import composed
from tests.kernels.decode_cases import CACHES, CASES, as_dtype, error, make_case, rope_table, run, without_rows

CPU = torch.device("cpu")
BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(native.cpu_available(CPU) is not None, reason=str(native.cpu_available(CPU)))
    ),
    "cpu",
    "torch",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case: tuple, backend: str) -> None:
    inputs = make_case(*case)
    exact = run(inputs, "reference", eps=1e-3, scale=0.3)
    got = run(as_dtype(inputs, torch.float32), backend, eps=1e-3, scale=0.3)
    assert got["out"].shape == (sum(case[0]), 2 * case[1] * case[2])
    for name, x in exact.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if backend != "native":
        assert max(error(run(inputs, backend, eps=1e-3, scale=0.3), exact).values()) < 1e-13


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_steps_are_causal_attention(backend: str) -> None:
    """Tokens of two responses one by one, against the training ops on the whole stream at once."""
    torch.manual_seed(0)
    heads, share, dim, prompts, budget = 2, 3, 16, (11, 6), 9
    lengths = [*prompts, budget, budget, budget]
    layout = PrefixLayout.from_lengths(lengths, parents=[-1, -1, 0, 0, 1])
    total = sum(lengths)
    mixed = torch.randn(total, heads, share + 2, dim)
    q_weight, k_weight = (1 + 0.3 * torch.randn(dim) for _ in range(2))
    starts = [0, 0, prompts[0], prompts[0], prompts[1]]
    position = torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)])
    query, key = qk_norm_mrope(
        mixed[:, :, :share].reshape(total, heads * share, dim),
        mixed[:, :, share],
        q_weight,
        k_weight,
        position.expand(3, -1),
        theta=1e4,
    )
    value = mixed[:, :, share + 1]
    want = prefix_attention(query, key, value, layout).flatten(1)

    longest = 16
    prompt_keys, prompt_values = torch.zeros(heads, 2, dim, longest), torch.zeros(heads, 2, longest, dim)
    for g, start in enumerate((0, prompts[0])):
        prompt_keys[:, g, :, : prompts[g]] = key[start : start + prompts[g]].permute(1, 2, 0)
        prompt_values[:, g, : prompts[g]] = value[start : start + prompts[g]].transpose(0, 1)
    own_keys, own_values = torch.zeros(heads, 3, dim, 16), torch.zeros(heads, 3, 16, dim)
    first = torch.tensor([sum(prompts) + budget * n for n in range(3)])
    for step in range(budget):
        got = decode_attention(
            mixed[first + step],
            q_weight,
            k_weight,
            rope_table(position[first + step], dim).float(),
            torch.full((3,), step),
            prompt_keys,
            prompt_values,
            torch.tensor(prompts),
            torch.tensor([0, 2, 3]),
            own_keys,
            own_values,
            backend=backend,
        )
        torch.testing.assert_close(got, want[first + step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The composed backend rounds each step, as half-precision models do."""
    inputs = as_dtype(make_case(*CASES[3]), dtype)
    for name in ("prompt_keys", "prompt_values", *CACHES):
        inputs[name].clamp_(-4, 4)
    exact = run(as_dtype(inputs, torch.float64), "reference")
    assert max(error(run(inputs, None), exact).values()) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_nothing(backend: str) -> None:
    inputs = as_dtype(make_case((2, 1), 2, 16, 8, 8), torch.float32)
    inputs["column"][:] = torch.tensor([-1, -1, 3])
    inputs["prompt_lengths"][0] = 0  # its two rows see nothing
    out = run(inputs, backend)["out"]
    assert out[:2].isnan().all() and out[2].isfinite().all()
    none = as_dtype(without_rows(), torch.float32)
    assert run(none, backend)["out"].shape == (0, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others_to_the_bit(backend: str) -> None:
    """That is the native backend's promise; torch may choose another order of sums for products of another size."""
    inputs = as_dtype(make_case((5, 6), 2, 32, 32, 40), torch.float32)
    whole = run(inputs, backend)["out"]
    assert torch.equal(whole, run(inputs, backend)["out"])
    for n in (0, 4, 7):
        g = int(n >= 5)
        one = dict(inputs, offsets=torch.tensor([0, 1]))
        for name in ("mixed", "column"):
            one[name] = inputs[name][n : n + 1]
        for name in ("rope", *CACHES):
            one[name] = inputs[name][:, n : n + 1].contiguous()
        for name in ("prompt_keys", "prompt_values"):
            one[name] = inputs[name][:, g : g + 1].contiguous()
        one["prompt_lengths"] = inputs["prompt_lengths"][g : g + 1]
        alone = run(one, backend)["out"][0]
        if backend == "native":
            assert torch.equal(alone, whole[n])
        torch.testing.assert_close(alone, whole[n])


@pytest.mark.skipif(native.cpu_available(CPU) is not None, reason=str(native.cpu_available(CPU)))
def test_threads_do_not_change_the_bits() -> None:
    inputs = as_dtype(make_case((40, 3, 25), 2, 32, 64, 64), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result[name], x) for result in results[1:] for name, x in results[0].items())


@pytest.mark.skipif(native.cpu_available(CPU) is not None, reason=str(native.cpu_available(CPU)))
def test_extreme_scores() -> None:
    """Weights that underflow are 0, and large scores do not overflow."""
    inputs = make_case((3, 2), 2, 16, 24, 16)
    inputs["q_weight"] *= 300
    exact = run(inputs, "reference")
    assert error(run(as_dtype(inputs, torch.float32), "native"), exact)["out"] < 1e-3
    assert (
        error(run(as_dtype(inputs, torch.float32), "native"), run(as_dtype(inputs, torch.float32), "cpu"))["out"] < 1e-3
    )


@pytest.mark.skipif(native.cpu_available(CPU) is not None, reason=str(native.cpu_available(CPU)))
def test_what_the_native_backend_refuses_the_next_serves() -> None:
    for change, reason in (
        (dict(dtype=torch.float64), "is compiled for float32, got torch.float64"),
        (dict(dim=12), "D=12 is no multiple of it"),
        (dict(longest=9), "P=9 is no multiple of it"),
        (dict(own=5), "M=5 is no multiple of it"),
    ):
        sizes = dict(counts=(2, 1), share=2, dim=16, longest=8, own=8)
        dtype = change.pop("dtype", torch.float32)
        inputs = as_dtype(make_case(**(sizes | change)), dtype)
        with pytest.raises(dispatch.BackendError, match=f"backend='native' cannot serve.*{reason}; can: cpu"):
            run(inputs, "native")
        assert torch.equal(run(inputs, None)["out"], run(inputs, "cpu")["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixed=torch.randn(3, 2, 2, 16)), r"mixed has shape \[3, 2, 2, 16\]: expected \[N, Hk, s \+ 2, D\]"),
        (dict(mixed=torch.ones(3, 2, 4, 16, dtype=torch.int64)), "mixed is torch.int64: expected floating point"),
        (dict(q_weight=torch.ones(8)), r"q_weight has shape \[8\].*expected \[16\]"),
        (dict(rope=torch.ones(2, 2, 16)), r"rope has shape \[2, 2, 16\].*expected \[2, 3, 16\]"),
        (dict(k_weight=torch.ones(16).double()), "k_weight is torch.float64 on cpu: mixed is torch.float32"),
        (dict(prompt_keys=torch.ones(2, 2, 8, 16)), r"prompt_keys has shape .* expected \[2, 2, 16, 8\]"),
        (dict(own_keys=torch.ones(2, 3, 8, 16)), r"own_keys has shape .* expected \[2, 3, 16, 8\]"),
        (dict(own_keys=torch.ones(2, 3, 8, 16).mT), r"own_keys has strides .*must be contiguous"),
        (dict(own_values=torch.ones(2, 3, 0, 16), own_keys=torch.ones(2, 3, 16, 0)), "at least one column"),
        (dict(column=torch.zeros(3)), r"column is torch.float32 \[3\].*expected int64 \[3\]"),
        (dict(column=torch.tensor([0, -2, 0])), r"column=\[0, -2, 0\]: must be -1 or more"),
        (dict(prompt_lengths=torch.tensor([1, 9])), r"prompt_lengths=\[1, 9\]: must be in 0..P=8"),
        (dict(offsets=torch.tensor([0, 4, 3])), r"offsets=\[0, 4, 3\]: must ascend from 0 to N=3"),
        (dict(offsets=torch.tensor([0, 3])), r"offsets is torch.int64 \[2\].*expected int64 \[3\]"),
        (dict(backend="cuda"), "backend='cuda' does not exist"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    inputs = as_dtype(make_case((2, 1), 2, 16, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=message):
        decode_attention(**(inputs | change))


@pytest.mark.parametrize(("device", "default"), [("cpu", "meta"), ("meta", "cpu")])
def test_the_torch_backend_neither_waits_for_a_device_nor_leaves_it(device: str, default: str) -> None:
    """On tensors without values: one that is asked for raises, and so does a tensor made on the default device."""
    inputs = as_dtype(make_case((2, 0, 1), 2, 16, 8, 8), torch.bfloat16)
    with FakeTensorMode():
        fake = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs.values()]
        with torch.device(default):
            out = composed.Backend.forward(*fake, 1e-6, 0.25)
    assert out.device.type == device and out.shape == (3, 64)
    expected = {backend: run(inputs, backend)["out"] for backend in ("torch", "cpu")}
    with torch.device("meta"):
        assert all(torch.equal(run(inputs, backend)["out"], out) for backend, out in expected.items())


def test_is_a_torch_op() -> None:
    inputs = as_dtype(make_case((2, 1), 2, 16, 8, 8), torch.float32)
    torch.library.opcheck(
        torch.ops.r4b_kernels.decode_attention.default,
        (*inputs.values(), 1e-6, 0.25, "cpu"),
        test_utils=("test_schema", "test_faketensor"),
    )
