"""What a decoder layer does between its two projections when it decodes: one new token per row, shared prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.decode_attention import composed as _composed
from r4b_kernels.decode_attention import cpu as _cpu
from r4b_kernels.decode_attention import reference as _reference

__all__ = ["decode_attention"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("decode_attention", "native", "r4b_kernels.decode_attention.native:Backend", native.cpu_available)
dispatch.register("decode_attention", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register(
    "decode_attention", "triton", "r4b_kernels.decode_attention.triton:Backend", dispatch.where_triton_runs
)
dispatch.register("decode_attention", "torch", _composed.Backend)
dispatch.register("decode_attention", "reference", _reference.Backend)


def decode_attention(
    mixed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    column: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_lengths: Tensor,
    offsets: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm and turn each head, append key and value to the row's cache, attend to the row's prompt and own tokens.

    Rows [offsets[g], offsets[g + 1]) respond to prompt g, whose keys and values are stored once for all of them. Row n
    writes to column ``column[n]`` of its own cache and sees its first ``column[n] + 1`` columns. A row whose column is
    -1 sees its prompt alone, and one with column >= M sees all of its M columns; what these two write to their first
    and to their last column stands for nothing.

    Args:
        mixed: [N, Hk, s + 2, D], the first projection: for each key/value head its s queries, its key, its value.
        q_weight: [D], the weight of the queries' norm, in the dtype and on the device of ``mixed`` as all that follow.
        k_weight: [D], that of the keys'.
        rope: [2, N, D], the factors of a head and of the head rolled by D/2: (cos, cos) and (-sin, sin) of the D/2
            angles of each row's position.
        column: int64 [N].
        prompt_keys: [Hk, G, D, P], normed and turned.
        prompt_values: [Hk, G, P, D].
        prompt_lengths: int64 [G], of the P columns those in use; the others may hold any finite value.
        offsets: int64 [G + 1], from 0 to N.
        own_keys: [Hk, N, D, M], changed in place; unused columns may hold any finite value.
        own_values: [Hk, N, M, D], changed in place.
        eps: added to the mean square of a head.
        scale: of the scores; by default D**-0.5.
        backend: a backend by name; by default the best one for the device.

    Returns:
        [N, Hk * s * D]. There is no gradient. A row that sees nothing at all gets NaN.

    Raises:
        ValueError: on shapes, dtypes, devices or memory layouts that do not fit, and values out of their range.
        BackendError: if ``backend`` does not exist or cannot serve the input.
    """
    caches = dict(prompt_keys=prompt_keys, prompt_values=prompt_values, own_keys=own_keys, own_values=own_values)
    _check_shapes(mixed, q_weight, k_weight, rope, caches)
    _check_rows(mixed, column, prompt_values, prompt_lengths, offsets)
    if scale is None:
        scale = mixed.shape[3] ** -0.5
    return _decode_attention(
        mixed,
        q_weight,
        k_weight,
        rope,
        column,
        prompt_keys,
        prompt_values,
        prompt_lengths,
        offsets,
        own_keys,
        own_values,
        float(eps),
        float(scale),
        backend,
    )


def _check_shapes(mixed: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, caches: dict[str, Tensor]) -> None:
    if mixed.dim() != 4 or mixed.shape[2] < 3 or mixed.shape[3] < 2 or mixed.shape[3] % 2:
        raise ValueError(f"mixed has shape {list(mixed.shape)}: expected [N, Hk, s + 2, D] with s >= 1 and an even D")
    if not mixed.is_floating_point():
        raise ValueError(f"mixed is {mixed.dtype}: expected floating point")
    rows, heads, _, dim = mixed.shape
    prompts, longest = caches["prompt_values"].shape[1:3] if caches["prompt_values"].dim() == 4 else (0, 0)
    own = caches["own_values"].shape[2] if caches["own_values"].dim() == 4 else 0
    expected = {
        "q_weight": (q_weight, [dim]),
        "k_weight": (k_weight, [dim]),
        "rope": (rope, [2, rows, dim]),
        "prompt_values": (caches["prompt_values"], [heads, prompts, longest, dim]),
        "prompt_keys": (caches["prompt_keys"], [heads, prompts, dim, longest]),
        "own_values": (caches["own_values"], [heads, rows, own, dim]),
        "own_keys": (caches["own_keys"], [heads, rows, dim, own]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: with mixed {list(mixed.shape)} expected {shape}")
        if tensor.dtype != mixed.dtype or tensor.device != mixed.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: mixed is {mixed.dtype} on {mixed.device}")
    if own < 1:
        raise ValueError(f"own_values has shape {list(caches['own_values'].shape)}: a row needs at least one column")
    for name, cache in caches.items():
        if not cache.is_contiguous():
            raise ValueError(f"{name} has strides {list(cache.stride())}: must be contiguous, a cache is not copied")


def _check_rows(mixed: Tensor, column: Tensor, prompt_values: Tensor, prompt_lengths: Tensor, offsets: Tensor) -> None:
    rows, (prompts, longest) = mixed.shape[0], prompt_values.shape[1:3]
    for name, tensor, size in (
        ("column", column, rows),
        ("prompt_lengths", prompt_lengths, prompts),
        ("offsets", offsets, prompts + 1),
    ):
        if tensor.dtype != torch.int64 or list(tensor.shape) != [size] or tensor.device != mixed.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                f"expected int64 [{size}] on {mixed.device}"
            )
    if mixed.device.type != "cpu":  # values are not waited for
        return
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets={offsets.tolist()}: must ascend from 0 to N={rows}")
    if prompts and not 0 <= int(prompt_lengths.min()) <= int(prompt_lengths.max()) <= longest:
        raise ValueError(f"prompt_lengths={prompt_lengths.tolist()}: must be in 0..P={longest}")
    if rows and int(column.min()) < -1:
        raise ValueError(f"column={column.tolist()}: must be -1 or more")


@torch.library.custom_op("r4b_kernels::decode_attention", mutates_args=("own_keys", "own_values"))
def _decode_attention(
    mixed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    column: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_lengths: Tensor,
    offsets: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    eps: float,
    scale: float,
    backend: str | None,
) -> Tensor:
    implementation = dispatch.resolve("decode_attention", mixed.device, backend, prompt_values, own_values)
    return implementation.forward(
        mixed.contiguous(),
        q_weight.contiguous(),
        k_weight.contiguous(),
        rope.contiguous(),
        column.contiguous(),
        prompt_keys,
        prompt_values,
        prompt_lengths.contiguous(),
        offsets.contiguous(),
        own_keys,
        own_values,
        eps,
        scale,
    )


@_decode_attention.register_fake
def _(
    mixed: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    column: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_lengths: Tensor,
    offsets: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    eps: float,
    scale: float,
    backend: str | None,
) -> Tensor:
    rows, heads, each, dim = mixed.shape
    return mixed.new_empty(rows, heads * (each - 2) * dim)
