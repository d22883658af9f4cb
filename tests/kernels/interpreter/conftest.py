"""The Triton kernels themselves, run on the CPU by Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreter

Without it nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreter import shim

    shim.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _plain_memory_is_nan() -> Iterator[None]:
    """Also where a launcher allocates with torch.empty: see tests/kernels/conftest.py."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield


@pytest.fixture
def same_in_any_order() -> Callable[[Callable[[], dict[str, Tensor]]], dict[str, Tensor]]:
    """same_in_any_order(f): f() once with the programs in order and once reversed; fails unless the bits are equal."""

    def run(function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        forwards = function()
        with shim.reversed_programs():
            backwards = function()
        for name, value in forwards.items():
            same = torch.equal(value.nan_to_num(7.0), backwards[name].nan_to_num(7.0))
            assert same, f"{name} depends on the order of the programs"
        return forwards

    return run
