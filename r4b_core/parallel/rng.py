"""Every random generator of this rank as one JSON-able value, and back."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from r4b_core.parallel import device


def capture() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, the device's, and Megatron-Core's named ones."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
        "device": _text(device.get_rng_state()),
        "tracker": {name: _text(state) for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }


def restore(state: dict[str, Any]) -> None:
    """Inverse of :func:`capture`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    device.set_rng_state(_tensor(state["device"]))
    tensor_parallel.get_cuda_rng_tracker().set_states({name: _tensor(text) for name, text in state["tracker"].items()})


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
