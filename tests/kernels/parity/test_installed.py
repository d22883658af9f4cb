"""No comparison is skipped by accident: the oracles that are installed are the pinned ones and can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest

ORACLES = Path(__file__).parents[2] / "oracles.txt"
PINS = dict(line.split("==") for line in ORACLES.read_text().splitlines() if line and line[0] != "#")
# What the tests import of each, where that is not the distribution's own name; verl's modules come without ray.
MODULES = {
    "attn_gym": "attn_gym.masks",
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel.chunked_loss",
    "prefix-grouper": "prefix_grouper",
    "verl": "tests.kernels.adapters.verl_oracle",
}
# Oracles that the environment of the tests brings with its other packages.
BROUGHT = {
    "datasets": "datasets",
    "megatron-core": "megatron.core",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "trl": "trl.trainer.grpo_trainer",
}


@pytest.mark.parametrize("name", [*PINS, *BROUGHT])
def test_an_installed_oracle_imports(name: str) -> None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed: scripts/setup_venv.sh test installs it")
    assert version == PINS.get(name, version), (
        f"tests/oracles.txt pins {PINS.get(name)}: run scripts/setup_venv.sh test"
    )
    importlib.import_module({**MODULES, **BROUGHT}.get(name, name))


def test_the_test_environment_is_complete_or_absent() -> None:
    """Where one oracle of the file is installed all are: half an environment would skip half of the comparisons."""
    installed = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    missing = {name for name in PINS if name.lower().replace("_", "-") not in installed}
    assert missing in (set(), set(PINS)), f"missing: {sorted(missing)}; run scripts/setup_venv.sh test"
