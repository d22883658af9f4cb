"""The commands: what they pass on, how they fail, and that asking for help costs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r4b_core.cli.main import app
from r4b_core.cli.output import console

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (*("demo", "train", "curate", "convert", "generate", "eval", "report", "plan", "show", "doctor", "bench"),)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a function into a module that the command will import; calls are recorded."""

    def put(module: str, name: str, result: Any = None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        made = types.ModuleType(module)
        setattr(made, name, recorded)
        monkeypatch.setitem(sys.modules, module, made)
        return calls

    return put


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from r4b_core.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_short_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command in run("--help").output


def test_show_prints_values_and_origins() -> None:
    lines = run("show", "demo", "bpo.steps=7", "bpo.algorithm=grpo").output.splitlines()
    rows = {line.split()[0]: line for line in lines if "." in line.split(" ")[0]}
    assert re.fullmatch(r"bpo\.steps\s+7\s+command line\s*", rows["bpo.steps"])
    assert re.fullmatch(r"bpo\.rollouts\s+free\s+preset grpo\s*", rows["bpo.rollouts"])
    assert re.fullmatch(r"bpo\.kl_coef\s+[\d.]+\s+demo\.yaml:\d+\s*", rows["bpo.kl_coef"])
    assert re.fullmatch(r"bpo\.epochs\s+1\s+default\s*", rows["bpo.epochs"])


def test_show_changed_leaves_out_defaults() -> None:
    assert "default" not in run("show", "demo", "--changed").output


def test_show_yaml_is_a_recipe(tmp_path: Path) -> None:
    text = run("show", "smoke", "--yaml").output
    (tmp_path / "again.yaml").write_text(text)
    assert run("show", str(tmp_path / "again.yaml"), "--yaml").output == text


def test_a_users_mistake_is_one_line_and_exit_2() -> None:
    result = run("show", "demo", "bpo.stepz=1")
    assert result.exit_code == 2
    assert result.stderr == "error: demo.yaml: bpo.stepz (command line): unknown key; did you mean bpo.steps?\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback() -> None:
    result = run("show", "demo", "bpo.stepz=1", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "RecipeError"


def test_our_own_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError out of numpy is not the user's, although it is a ValueError."""

    def broken(path: Path) -> None:
        import numpy as np

        np.zeros(3).reshape(2)

    module = types.ModuleType("r4b_core.telemetry.report")
    module.write_report = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "r4b_core.telemetry.report", module)
    result = run("report", "x")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_interrupt_exits_130_and_says_how_to_go_on(stub: Any) -> None:
    stub("r4b_core.stages.demo", "run_demo", KeyboardInterrupt("stopped after bpo step 3; go on with: r4b train x"))
    result = run("demo")
    assert result.exit_code == 130
    assert result.stderr == "stopped after bpo step 3; go on with: r4b train x\n"


def test_train_passes_the_resolved_recipe_on(stub: Any, tmp_path: Path) -> None:
    calls = stub("r4b_core.stages.run", "run_recipe")
    assert run("train", "smoke", "bpo.steps=9", "--run", str(tmp_path), "--resume", "never").exit_code == 0
    ((resolved, folder), options) = calls[0]
    assert (resolved.recipe.bpo.steps, folder, options) == (9, tmp_path, {"resume": "never"})


def test_torchrun_leaves_our_options_alone() -> None:
    """torchrun's parser takes an option of ours that is a prefix of one of its own for that one, even after -m."""
    from torch.distributed.run import get_args_parser

    ours = ["train", "smoke", "bpo.steps=1", "--run-dir", "here", "--resume", "never", "--debug"]
    parsed = get_args_parser().parse_args(["--nproc-per-node=2", "-m", "r4b_core.cli.main", *ours])
    assert parsed.training_script_args == ours


def test_train_names_the_run_folder_after_the_recipe(stub: Any) -> None:
    calls = stub("r4b_core.stages.run", "run_recipe")
    assert run("train", "smoke").exit_code == 0
    assert calls[0][0][1] == Path("runs/smoke")


def test_train_refuses_an_impossible_layout_before_it_starts(stub: Any) -> None:
    calls = stub("r4b_core.stages.run", "run_recipe")
    result = run("train", "smoke", "parallel.tp=2")
    assert result.exit_code == 2 and "needs a multiple of 2 ranks, there are 1" in result.stderr
    assert not calls


def test_demo_passes_its_options_on(stub: Any) -> None:
    calls = stub("r4b_core.stages.demo", "run_demo")
    assert run("demo", "--seed", "3", "--compare", "--run", "here").exit_code == 0
    assert calls == [((Path("here"),), {"seed": 3, "compare": True})]


def test_eval_passes_its_options_on(stub: Any) -> None:
    calls = stub("r4b_core.evaluate.run", "evaluate_run")
    assert run("eval", "run", "--items", "5").exit_code == 0
    assert calls == [((Path("run"),), {"items": 5})]


def test_report_prints_where_it_is(stub: Any) -> None:
    stub("r4b_core.telemetry.report", "write_report", Path("run/report.html"))
    assert run("report", "run").output == "run/report.html\n"


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert console().quiet
    result = run("show", "demo", "bpo.stepz=1")
    assert result.exit_code == 2 and result.output == ""
