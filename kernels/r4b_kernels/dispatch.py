"""The one place that picks a backend for an op, and says which and why.

An op registers its backends in the order of preference with a predicate that answers, from the input's device alone,
None ("I can") or the reason why not. The choice is made once per (op, device type) and logged once. A backend that
serves a device but not every input there has a ``refuses(*tensors)`` that answers in the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("r4b_kernels")

Availability = Callable[[torch.device], str | None]


class BackendError(ValueError):
    """A backend was asked for that cannot serve the input."""


@dataclass
class _Backend:
    available: Availability
    implementation: Any  # or "module:attribute", until it is used

    def load(self) -> Any:
        if isinstance(self.implementation, str):
            module, attribute = self.implementation.split(":")
            self.implementation = getattr(importlib.import_module(module), attribute)
        return self.implementation


_OPS: dict[str, dict[str, _Backend]] = {}
_CHOSEN: dict[tuple[str, str], str] = {}
_REFUSED: set[tuple[str, str, str]] = set()


def only_on(device_type: str) -> Availability:
    """A predicate for backends that run on one device type."""
    reason = f"runs on {device_type}, the input is on "
    return lambda device: None if device.type == device_type else reason + device.type


def anywhere(device: torch.device) -> None:
    """A predicate for backends that run on every device."""
    return None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def where_triton_runs(device: torch.device) -> str | None:
    """A predicate for Triton kernels: CUDA devices from compute capability 8.0 on; the CPU under the interpreter."""
    if not _has_triton():
        return "triton is not installed (torch's CUDA builds bring it)"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"runs on cuda (and on the CPU where TRITON_INTERPRET=1), the input is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0 or more, this GPU has {major}.{minor}"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def register(op: str, backend: str, implementation: Any, available: Availability = anywhere) -> None:
    """Add a backend to an op. Earlier registrations are preferred.

    Args:
        op: the op's name.
        backend: the backend's name.
        implementation: a function or a class with forward and backward, as the op wants it; or "module:attribute",
            imported at its first use, so that what it needs must not be installed.
        available: None for devices it serves, for others the reason why not.
    """
    _OPS.setdefault(op, {})[backend] = _Backend(available, implementation)


def resolve(op: str, device: torch.device, backend: str | None, *inputs: Tensor) -> Any:
    """The implementation of ``op`` for ``inputs`` on a device; ``backend`` asks for one by name.

    Without a name it is the op's choice for the device. If that one refuses the inputs, the next that takes them
    serves, and a warning says so once for each reason. On a GPU that is not the current one, it runs with that GPU as
    the current one: Triton launches there, wherever its arguments are.

    Raises:
        BackendError: if the named backend does not exist or cannot serve the input; says why and what can.
    """
    backends = _OPS[op]
    name = backend or _CHOSEN.get((op, device.type)) or _choose(op, device)
    if name not in backends:
        raise BackendError(f"{op}: backend={backend!r} does not exist; there are {', '.join(backends)}")
    # The usual way, in as few steps as there can be.
    if backend is None or (reason := backends[name].available(device)) is None:
        implementation = backends[name].load()
        refuses = getattr(implementation, "refuses", None)
        if refuses is None or (reason := refuses(*inputs)) is None:
            return _on(device, implementation)
    others = [other for other in backends if other != name and _why_not(op, other, device, inputs) is None]
    if backend is not None or not others:
        able = ", ".join(others) or "none"
        raise BackendError(f"{op}: backend={name!r} cannot serve this input: {reason}; can: {able}")
    if (op, name, reason) not in _REFUSED:
        _REFUSED.add((op, name, reason))
        logger.warning("%s on %s: %s instead of %s: %s", op, device.type, others[0], name, reason)
    return _on(device, backends[others[0]].load())


def check_devices(first: str, device: torch.device, **others: Tensor | None) -> None:
    """Raise a ValueError that names the argument unless all tensors are where the one called ``first`` is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {device}: move one, they must agree")


class _Elsewhere:
    """An implementation whose functions run with ``device`` as the current GPU."""

    def __init__(self, device: torch.device, implementation: Any) -> None:
        self._device, self._implementation = device, implementation

    def __call__(self, *inputs: Any) -> Any:
        with torch.cuda.device(self._device):
            return self._implementation(*inputs)

    def __getattr__(self, name: str) -> _Elsewhere:
        return _Elsewhere(self._device, getattr(self._implementation, name))


def _on(device: torch.device, implementation: Any) -> Any:
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return implementation
    return _Elsewhere(device, implementation)


def _why_not(op: str, name: str, device: torch.device, inputs: tuple[Tensor, ...]) -> str | None:
    entry = _OPS[op][name]
    if (reason := entry.available(device)) is not None:
        return reason
    refuses = getattr(entry.load(), "refuses", None)
    return refuses(*inputs) if refuses else None


def _choose(op: str, device: torch.device) -> str:
    for name, entry in _OPS[op].items():
        if entry.available(device) is None:
            _CHOSEN[op, device.type] = name
            logger.info("%s on %s: %s", op, device.type, name)
            return name
    raise BackendError(f"{op}: no backend serves {device.type}")


def table(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(op, backend, reason or '') rows for a device: the chosen backend has the reason 'chosen'. For `r4b doctor`."""
    device = torch.device(device)
    rows = []
    for op, backends in sorted(_OPS.items()):
        chosen = _CHOSEN.get((op, device.type)) or _choose(op, device)
        for name, entry in backends.items():
            rows.append((op, name, "chosen" if name == chosen else entry.available(device) or ""))
    return rows
