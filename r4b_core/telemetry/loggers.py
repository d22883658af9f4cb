"""Optional dashboards behind one small interface (``metrics.Logger``); each is imported only when the recipe asks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from r4b_core.telemetry.metrics import Logger

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_loggers(names: list[str]) -> None:
    """Refuse a dashboard that cannot work, before anything is launched.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"telemetry.loggers: {name!r} is unknown: use any of {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"telemetry.loggers asks for {name!r} and the package {PACKAGES[name]!r} is not installed: "
                f"pip install 'r4b[{name}]', or take {name!r} out of the list (metrics.jsonl is always written)"
            )


def open_loggers(
    names: list[str], *, folder: Path, recipe: Mapping[str, Any], resumed_at: tuple[str, int] | None
) -> list[Logger]:
    """The dashboards of ``telemetry.loggers``, in that order.

    Raises:
        ValueError: see ``check_loggers``.
    """
    check_loggers(names)
    opened: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            opened.append(TensorBoardLogger(folder / "tensorboard", resumed_at))
        elif name == "wandb":
            opened.append(WandbLogger(importlib.import_module("wandb"), folder, recipe, resumed_at is not None))
        else:
            opened.append(TrackioLogger(importlib.import_module("trackio"), folder, recipe, resumed_at is not None))
    return opened


class TensorBoardLogger:
    """One event folder per stage, because each stage counts its own steps.

    On resume the events after the checkpoint's step are purged, so that no curve runs back on itself.
    """

    def __init__(self, folder: Path, resumed_at: tuple[str, int] | None) -> None:
        self._folder = folder
        self._resumed_at = resumed_at
        self._writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        writer = self._writer(stage)
        for name, value in _numbers(values).items():
            writer.add_scalar(name, value, step)

    def alarm(self, stage: str, step: int, message: str) -> None:
        self._writer(stage).add_text("alarm", message, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._resumed_at[1] + 1 if self._resumed_at and self._resumed_at[0] == stage else None
            self._writers[stage] = SummaryWriter(str(self._folder / stage), purge_step=purge)
        return self._writers[stage]


class WandbLogger:
    """Weights & Biases. Every stage has its own x-axis ``<stage>/step``."""

    def __init__(self, wandb: ModuleType, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        self._run = wandb.init(
            project="r4b", name=folder.name, dir=str(folder), config=dict(recipe), resume="allow" if resumed else None
        )
        self._alarm_level = wandb.AlertLevel.WARN
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        named = {f"{stage}/{name}": value for name, value in _numbers(values).items()}
        self._run.log(named | {f"{stage}/step": step})

    def alarm(self, stage: str, step: int, message: str) -> None:
        self._run.alert(title=f"{stage} step {step}", text=message, level=self._alarm_level)

    def close(self) -> None:
        self._run.finish()


class TrackioLogger:
    """trackio: W&B-shaped calls into a local database, no account."""

    def __init__(self, trackio: ModuleType, folder: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        self._trackio = trackio
        trackio.init(project="r4b", name=folder.name, config=dict(recipe), resume="allow" if resumed else "never")

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        named = {f"{stage}/{name}": value for name, value in _numbers(values).items()}
        self._trackio.log(named | {f"{stage}/step": step})

    def alarm(self, stage: str, step: int, message: str) -> None:
        self._trackio.log({f"{stage}/alarm": message, f"{stage}/step": step})

    def close(self) -> None:
        self._trackio.finish()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
