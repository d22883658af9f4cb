"""The example in kernels/README.md runs, and its table names every exported operator."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import r4b_kernels

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")


def test_the_example_trains() -> None:
    section = README.partition("## In ten lines")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(compile(example, "kernels/README.md", "exec"), names)
    for name in ("q", "k", "v", "weight"):
        gradient = names[name].grad
        assert gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any()), name


def test_every_operator_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| \[(\w+)\]", README, re.MULTILINE))
    assert listed == {name for name in r4b_kernels.__all__ if name.islower()}
    for name in listed:
        assert (Path(r4b_kernels.__file__).parent / name / "README.md").is_file()
