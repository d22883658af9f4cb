"""Activations that the backward pass computes again instead of keeping them.

``full`` is Megatron-Core's checkpoint around every layer: only a layer's input stays. ``selective`` repeats what costs
no matrix product and no message (norms, rotation, activation functions) by :func:`recomputing`; Megatron-Core's own
selective modules repeat matrix products ("mlp", "core_attn") or need TransformerEngine ("layernorm").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Function = Callable[..., Any]


class _Call:
    """One call, to be repeated without a graph. Repeated outputs live until each of them was asked for once."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.inputs = tuple(x.detach() for x in inputs)
        self.waiting: dict[int, Tensor] = {}

    def output(self, number: int) -> Tensor:
        if number not in self.waiting:
            with torch.no_grad():
                outputs = self.function(*self.inputs, **self.options)
            self.waiting = dict(enumerate(outputs if isinstance(outputs, tuple) else (outputs,)))
        return self.waiting.pop(number)


class _Scope:
    """Results of the calls made while it is open, by address: they stay alive, so no address is given away twice."""

    def __init__(self) -> None:
        self.results: dict[int, tuple[_Call, int, Tensor]] = {}

    def remember(self, call: _Call, outputs: tuple[Tensor, ...]) -> None:
        for number, output in enumerate(outputs):
            if output.numel():
                self.results[output.untyped_storage().data_ptr()] = (call, number, output)

    def pack(self, tensor: Tensor) -> Any:
        if (found := self.results.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor
        call, number, _ = found
        return call, number, (tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    call, number, view = packed
    return call.output(number).as_strided(*view)


_open: list[_Scope] = []


@contextmanager
def recomputing() -> Iterator[None]:
    """While open, nothing keeps the outputs of :func:`again` for the backward pass, which repeats the calls instead."""
    scope = _Scope()
    _open.append(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _open.remove(scope)
        scope.results.clear()


def again(function: Function, *inputs: Tensor, **options: Any) -> Any:
    """``function(*inputs, **options)``, cheap and repeatable: inside :func:`recomputing` its outputs are not kept."""
    outputs = function(*inputs, **options)
    if _open and torch.is_grad_enabled():
        call = _Call(function, inputs, options)
        _open[-1].remember(call, outputs if isinstance(outputs, tuple) else (outputs,))
    return outputs


def recomputes_fully(module: nn.Module, config: TransformerConfig) -> bool:
    """Whether the layers of ``module`` are checkpoints in this forward pass."""
    return config.recompute_granularity == "full" and module.training and torch.is_grad_enabled()


def with_gradient(x: Tensor, module: nn.Module) -> Tensor:
    """``x``, the input of checkpoints of ``module``, as a tensor that requires a gradient if any parameter does.

    A checkpoint whose inputs need no gradient gives none to the parameters inside either.
    """
    if x.requires_grad or not any(parameter.requires_grad for parameter in module.parameters()):
        return x
    return x.detach().requires_grad_()


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which only ``x`` is kept."""
    return tensor_parallel.checkpoint(function, False, x)
