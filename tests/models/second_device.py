"""A second device without hardware: tensors that compute on the CPU and may not meet tensors that do.

torch's fake tensors play a GPU too, but hold no values, and training reads some (counts, drawn tokens); in a CPU build
of torch their backward pass ends the process. Here a tensor of the second device wraps one of the CPU. It is labelled
``meta``, which the autograd engine of every build knows. What a GPU refuses is refused: a tensor of the host that is no
scalar, in an operator with one of the device. What makes the host wait for a GPU is counted.

Not seen: streams, kernels of the device (the CPU's compute), memory, and operators that share a storage by address.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import default_planner
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from r4b_core.parallel import device as device_module

SECOND = torch.device("meta")
_aten = torch.ops.aten
# Operators that take tensors of both devices, as on a GPU: copies, and indices of the host (which are copied).
_BRIDGES = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default}
_WAITS = {
    _aten._local_scalar_dense.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "nonzero",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
    _aten.equal.default: "item",
}


class OnSecond(Tensor):
    """A tensor of the second device; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnSecond:
        # A wrapper made in inference mode could not be viewed.
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=SECOND,
            )
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # Megatron-Core moves parameters into its buffers so, and makes tensors that are no views.
        assert isinstance(value, OnSecond)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"second({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class MixedDevices(RuntimeError):
    """An operator got tensors of both devices."""


waits: Counter[str] = Counter()
"""How often the device was waited for, by reason, since the device was last entered."""


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [isinstance(tensor, OnSecond) for tensor in tensors]
    assert not any(tensor.is_meta and not on for tensor, on in zip(tensors, here, strict=True)), f"{func}: no values"
    if any(here) and not all(here) and func not in _BRIDGES:
        strangers = [tensor for tensor, on in zip(tensors, here, strict=True) if not on and tensor.dim()]
        if strangers:
            shapes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in strangers]
            raise MixedDevices(f"{func}: {', '.join(shapes)} of the CPU with tensors of the device")
    if any(here) and func in _WAITS:
        waits[_WAITS[func]] += 1
    wrap = bool(here) and here[0] if func is _aten.copy_.default else any(here)
    if (place := kwargs.get("device")) is not None:
        wrap = torch.device(place).type == SECOND.type
        if any(here) and not wrap:
            waits["copy to the host"] += 1
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False} if wrap else kwargs
    with _disable_current_modes():
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if any(here) and func.namespace == "r4b_kernels":
            _check_fake(func, args, kwargs, out)
    return tree_map(lambda leaf: OnSecond(leaf) if wrap and isinstance(leaf, Tensor) else leaf, out)


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnSecond) else leaf


def _check_fake(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """An op of ours promises the device, shapes and dtypes that it delivers."""

    def bare(leaf: Any) -> Any:
        return _inner(leaf).to("meta") if isinstance(leaf, Tensor) else leaf

    promised = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    for fake, real in zip(tree_leaves(promised), tree_leaves(out), strict=True):
        if isinstance(real, Tensor):
            assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, "meta"), (
                f"{func} promises {fake.dtype} {list(fake.shape)} on {fake.device} and delivers "
                f"{real.dtype} {list(real.shape)}"
            )


class _Mode(TorchDispatchMode):
    """Sees the factories, which have no tensor to go by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """What torch makes below the level of dispatch (`torch.tensor`, indices from lists) is copied from the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and place is not None and torch.device(place).type == SECOND.type:
            return func(*args, **{**kwargs, "device": None}).to(SECOND)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnSecond):
            tensor, index, *value = args
            index = tuple(map(_index, index)) if isinstance(index, tuple) else _index(index)
            return func(tensor, index, *value)
        return func(*args, **kwargs)


def _index(part: Any) -> Any:
    return torch.tensor(part).to(SECOND) if isinstance(part, list) else part


@contextmanager
def second_device() -> Iterator[Counter[str]]:
    """While open, this rank's device is the second one, for our code and for Megatron-Core's; yields `waits`."""
    with pytest.MonkeyPatch.context() as patch, _Mode(), _Constructors():
        _patch_ours(patch)
        _patch_megatron(patch)
        _patch_checkpoints(patch)
        waits.clear()
        yield waits


def _patch_ours(patch: pytest.MonkeyPatch) -> None:
    original = device_module.device
    for name, module in list(sys.modules.items()):
        if name.startswith("r4b_core."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, attribute, lambda: SECOND)


def _patch_checkpoints(patch: pytest.MonkeyPatch) -> None:
    # DCP would allocate what is labelled so; here it is allocated.
    patch.setattr(default_planner, "_init_state_dict", lambda state: None)


def _patch_megatron(patch: pytest.MonkeyPatch) -> None:
    """In its copies of ``torch``, CUDA means the second device instead of the CPU."""
    named = (module.torch for name, module in sys.modules.items() if device_module._is_megatron(name) and _has(module))
    copies = {id(stand_in): stand_in for stand_in in named if stand_in is not torch}

    def elsewhere(factory: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if device_module._names_cuda(kwargs.get("device")):
                kwargs["device"] = SECOND
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return call

    for stand_in in copies.values():
        patch.setattr(stand_in.cuda, "current_device", lambda: SECOND)
        for name in device_module._FACTORIES:
            patch.setattr(stand_in, name, elsewhere(getattr(torch, name)))
    kind = Tensor.type

    def cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if isinstance(self, OnSecond) else self.to(SECOND)

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind(_inner(self), *args, **kwargs) if args or kwargs else _type_name(self)

    patch.setattr(Tensor, "cuda", cuda)
    patch.setattr(Tensor, "type", type_)


def _type_name(tensor: Tensor) -> str:
    names = {torch.float32: "Float", torch.float64: "Double", torch.bfloat16: "BFloat16", torch.float16: "Half"}
    where = "torch.cuda" if isinstance(tensor, OnSecond) else "torch"
    return f"{where}.{names.get(tensor.dtype, 'Other')}Tensor"


def _has(module: Any) -> bool:
    return getattr(getattr(module, "torch", None), "__name__", "") == "torch"
