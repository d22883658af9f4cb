"""Makes Triton's CPU interpreter honest, for Triton 3.6 to 3.9 and any numpy.

As it comes, the interpreter multiplies the raw bits of bfloat16, truncates where hardware rounds, reads and writes
outside of tensors, and runs programs in one order only. With ``install()``

- bfloat16 products and casts are exact, and arithmetic on bfloat16 itself is refused (kernels compute in float32);
- every lane of a load, store or atomic must lie inside an argument of the launch, else IndexError;
- ``tl.device_assert`` fires, and an autotuned kernel takes its first configuration;
- ``reversed_programs()`` runs the grid backwards, so that results that depend on the order show.

Import before any module that holds kernels; TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import autotuner, interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

# Pointwise operations besides create_f*: they too would see raw bits.
_POINTWISE = (
    "create_minimumf create_minnumf create_maximumf create_maxnumf create_clampf create_precise_divf create_exp "
    "create_exp2 create_log create_sqrt"
).split()
_CASTS = ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc", "create_fp_to_si", "create_fp_to_ui")

_reversed = False
_installed = False


@contextlib.contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every launch from the last to the first."""
    global _reversed
    _reversed = True
    try:
        yield
    finally:
        _reversed = False


def install() -> None:
    """Patch the interpreter; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)
    _exact_bfloat16()
    _refuse_bfloat16_arithmetic()
    _index_with_new_numpy()
    _check_bounds()
    _order_programs()
    _take_first_configuration()


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return Handle(bfloat16_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _exact_bfloat16() -> None:
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        scalar = target.scalar
        if _is_bfloat16(source) and scalar != tl.bfloat16:
            wide = _widened(source)
            return wide if scalar == tl.float32 else cast(self, wide, target)
        if scalar == tl.bfloat16 and not _is_bfloat16(source):
            return Handle(float32_to_bfloat16(source.data.astype(np.float32)), scalar)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        widths = (source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth)
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if (_is_bfloat16(source) or target.scalar == tl.bfloat16) and nearest and 8 not in widths:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


def _refuse_bfloat16_arithmetic() -> None:
    def refusing(name: str) -> Callable:
        original = getattr(Builder, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(_is_bfloat16(x) for x in args):
                raise TypeError(f"{name} on bfloat16: a kernel computes in float32, cast with .to(tl.float32)")
            return original(self, *args, **kwargs)

        return call

    for name in dir(Builder):
        if (name.startswith("create_f") and name not in _CASTS) or name in _POINTWISE:
            setattr(Builder, name, refusing(name))

    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        original = kind.apply_impl

        def apply_impl(self: Any, input: Any, original: Callable = original) -> Any:
            inputs = input if isinstance(input, tuple) else (input,)
            if any(_is_bfloat16(x.handle) for x in inputs):
                raise TypeError("reduction or scan over bfloat16: cast with .to(tl.float32)")
            return original(self, input)

        kind.apply_impl = apply_impl


def _index_with_new_numpy() -> None:
    """numpy 2.4 no longer turns one-element arrays into integers, which Triton 3.6 relies on for loop bounds."""
    if not triton.__version__.startswith(("3.5.", "3.6.")):
        return
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)

        def index(self: Any) -> int:
            return int(self.handle.data.squeeze())

        if scope and hasattr(scope[0], "set_attr"):
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


def _check_bounds() -> None:
    executor = interpreter.GridExecutor
    spans: list[tuple[int, int]] = []  # addresses [start, stop) of the running launch's tensors
    init = executor._init_args_hst

    def collect(argument: Any) -> None:
        if isinstance(argument, (tuple, list)):
            for item in argument:
                collect(item)
        elif hasattr(argument, "base") and hasattr(argument, "block_shape"):
            collect(argument.base)
        elif hasattr(argument, "untyped_storage"):
            storage = argument.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        result = init(self, args, kwargs)
        spans.clear()
        collect(list(result[0]))
        collect(list(result[1].values()))
        spans.sort()
        return result

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        used = pointers.data
        if mask is not None:
            used = used[np.broadcast_to(mask.data, used.shape)]
        if used.size == 0 or not spans:
            return
        used = used.reshape(-1).astype(np.uint64)
        starts, stops = np.array(spans, dtype=np.uint64).T
        span = np.searchsorted(starts, used, side="right") - 1
        outside = (span < 0) | (used + np.uint64(size) > stops[np.maximum(span, 0)])
        if outside.any():
            raise IndexError(f"{what}: {int(outside.sum())} lanes outside every argument of the launch")

    def checked(name: str) -> None:
        original = getattr(Builder, name)
        parameters = list(inspect.signature(original).parameters)
        pointers_at = next(i for i, parameter in enumerate(parameters) if parameter in ("ptrs", "ptr")) - 1
        mask_at = parameters.index("mask") - 1 if "mask" in parameters else None

        def call(self: Any, *args: Any) -> Any:
            check(name, args[pointers_at], None if mask_at is None else args[mask_at])
            return original(self, *args)

        setattr(Builder, name, call)

    executor._init_args_hst = init_args
    # Plain loads and stores come here too, with a mask of their own.
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
        checked(name)


def _order_programs() -> None:
    set_grid_idx = Builder.set_grid_idx

    def set_index(self: Any, x: int, y: int, z: int) -> Any:
        if _reversed:
            x, y, z = (size - 1 - i for size, i in zip(self.grid_dim, (x, y, z), strict=True))
        return set_grid_idx(self, x, y, z)

    Builder.set_grid_idx = set_index


def _take_first_configuration() -> None:
    init = autotuner.Autotuner.__init__

    def first_only(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        init(self, fn, arg_names, list(configs)[:1] if configs else configs, *args, **kwargs)

    autotuner.Autotuner.__init__ = first_only
