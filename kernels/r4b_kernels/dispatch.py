"""The one place that picks a backend for an op, and says which and why.

An op registers its backends in the order of preference with a predicate that answers, from the input's device alone,
None ("I can") or the reason why not. The choice is made once per (op, device type) and logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("r4b_kernels")

Availability = Callable[[torch.device], str | None]


class BackendError(ValueError):
    """A backend was asked for that cannot serve the input."""


@dataclass
class _Op:
    implementations: dict[str, Any] = field(default_factory=dict)
    availability: dict[str, Availability] = field(default_factory=dict)


_OPS: dict[str, _Op] = {}
_CHOSEN: dict[tuple[str, str], str] = {}


def only_on(device_type: str) -> Availability:
    """A predicate for backends that run on one device type."""
    reason = f"runs on {device_type}, the input is on "
    return lambda device: None if device.type == device_type else reason + device.type


def anywhere(device: torch.device) -> None:
    """A predicate for backends that run on every device."""
    return None


def register(op: str, backend: str, available: Availability = anywhere) -> Callable[[Any], Any]:
    """Decorator: make a function, or a class with forward and backward, the implementation of ``op`` on ``backend``.

    Earlier registrations are preferred.
    """

    def wrap(implementation: Any) -> Any:
        entry = _OPS.setdefault(op, _Op())
        entry.implementations[backend] = implementation
        entry.availability[backend] = available
        return implementation

    return wrap


def resolve(op: str, device: torch.device, backend: str | None = None) -> Any:
    """The implementation of ``op`` for a device; ``backend`` asks for one by name.

    Raises:
        BackendError: if the named backend does not exist or cannot serve the device; says why and what can.
    """
    entry = _OPS[op]
    if backend is None:
        name = _CHOSEN.get((op, device.type)) or _choose(op, device)
        return entry.implementations[name]
    if backend not in entry.implementations:
        raise BackendError(f"{op}: backend={backend!r} does not exist; there are {', '.join(entry.implementations)}")
    if reason := entry.availability[backend](device):
        able = [name for name, available in entry.availability.items() if available(device) is None]
        raise BackendError(f"{op}: backend={backend!r} cannot serve this input: {reason}; can: {', '.join(able)}")
    return entry.implementations[backend]


def _choose(op: str, device: torch.device) -> str:
    for name, available in _OPS[op].availability.items():
        if available(device) is None:
            _CHOSEN[op, device.type] = name
            logger.info("%s on %s: %s", op, device.type, name)
            return name
    raise BackendError(f"{op}: no backend serves {device.type}")


def table(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(op, backend, reason or '') rows for a device: the chosen backend has the reason 'chosen'. For `r4b doctor`."""
    device = torch.device(device)
    rows = []
    for op, entry in sorted(_OPS.items()):
        chosen = _CHOSEN.get((op, device.type)) or _choose(op, device)
        for name, available in entry.availability.items():
            rows.append((op, name, "chosen" if name == chosen else available(device) or ""))
    return rows
