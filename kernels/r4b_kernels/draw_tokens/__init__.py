"""The next token of every row from its logits, at a given point of the distribution, with log-prob and entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from r4b_kernels import dispatch, native
from r4b_kernels.draw_tokens import cpu as _cpu
from r4b_kernels.draw_tokens import reference as _reference

__all__ = ["draw_tokens"]

# Order is preference: the reference serves only where nothing better does.
dispatch.register("draw_tokens", "native", "r4b_kernels.draw_tokens.native:Backend", native.cpu_available)
dispatch.register("draw_tokens", "cpu", _cpu.Backend, dispatch.only_on("cpu"))
dispatch.register("draw_tokens", "triton", "r4b_kernels.draw_tokens.triton:Backend", dispatch.where_triton_runs)
dispatch.register("draw_tokens", "torch", _cpu.Backend)
dispatch.register("draw_tokens", "reference", _reference.Backend)


def draw_tokens(
    logits: Tensor,
    point: Tensor,
    forced: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert the CDF of each row's distribution, in the order of the vocabulary, at the row's point.

    Args:
        logits: [N, V], floating point, V >= 1.
        point: float64 [N] in [0, 1).
        forced: int64 [N], a token to take whatever its probability, or -1; None forces none.
        temperature: 0 takes the most probable token; what is reported is then at temperature 1.
        top_p: above 0; draws from the smallest set of the most probable tokens that reaches it. 1 keeps all.
        backend: a backend by name; by default the best one for the device.

    Returns:
        (token int64 [N], logprob [N], entropy [N]), the latter in nats, of the full distribution at ``temperature``, in
        float32 (float64 for float64 logits). There is no gradient.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, and values out of their range.
        BackendError: if ``backend`` does not exist or cannot serve the input.
    """
    _check(logits, point, forced, temperature, top_p)
    return _draw_tokens(logits, point, forced, float(temperature), float(top_p), backend)


def _check(logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float) -> None:
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}: expected floating point [N, V], V >= 1")
    rows = logits.shape[0]
    for name, tensor, dtype in (("point", point, torch.float64), ("forced", forced, torch.int64)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or list(tensor.shape) != [rows] or tensor.device != logits.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: "
                f"expected {dtype} [{rows}] on {logits.device}"
            )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be positive, or 0 for the most probable token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1 (1 keeps every token)")
    if logits.device.type != "cpu" or not rows:  # values are not waited for
        return
    if not bool(((point >= 0) & (point < 1)).all()):
        raise ValueError(f"point={point.tolist()}: must be in [0, 1)")
    if forced is not None and not -1 <= int(forced.min()) <= int(forced.max()) < logits.shape[1]:
        raise ValueError(f"forced={forced.tolist()}: must be a token below V={logits.shape[1]}, or -1")


@torch.library.custom_op("r4b_kernels::draw_tokens", mutates_args=())
def _draw_tokens(
    logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = dispatch.resolve("draw_tokens", logits.device, backend, logits)
    forced = None if forced is None else forced.contiguous()
    return implementation.forward(logits.contiguous(), point.contiguous(), forced, temperature, top_p)


@_draw_tokens.register_fake
def _(
    logits: Tensor, point: Tensor, forced: Tensor | None, temperature: float, top_p: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    value = logits.new_empty(rows, dtype=dtype)
    return logits.new_empty(rows, dtype=torch.int64), value, torch.empty_like(value)
