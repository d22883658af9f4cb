"""Importing the kernels, and every adapter, imports no trainer."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import r4b_kernels.adapters

MODULES = [module.name for module in pkgutil.iter_modules(r4b_kernels.adapters.__path__)]
FOREIGN = {"accelerate", "datasets", "megatron", "r4b_core", "ray", "tensordict", "transformers", "trl", "verl"}


def test_adapters_import_their_packages_when_used() -> None:
    assert {"huggingface", "megatron", "trl", "verl"} <= set(MODULES)
    names = ["r4b_kernels", *(f"r4b_kernels.adapters.{name}" for name in MODULES)]
    program = f"import sys, {', '.join(names)}; print(*({FOREIGN} & set(sys.modules)))"
    path = [entry for entry in sys.path if entry]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == []
