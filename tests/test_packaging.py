"""What ships: both wheels build, hold every source and data file, and the environment script does nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from r4b_kernels import build

ROOT = Path(__file__).resolve().parents[1]
DATA = {".css", ".html", ".j2", ".js", ".md", ".yaml", ".typed"}


def build_wheel(project: Path, target: Path, **environment: str) -> Path:
    """A project's wheel, without CUDA. The project must be a copy: building leaves things behind."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, "R4B_BUILD_CUDA": "0", **environment}
    subprocess.run([*command, "--wheel-dir", str(target), str(project)], check=True, env=environment)
    (wheel,) = target.glob("*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sources(package: Path) -> set[str]:
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.suffix in DATA | {".py"} or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository without what is not built from."""
    target = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("kernels", "r4b_core", "recipes"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def whole(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of everything."""
    return build_wheel(copy, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def kernels(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the kernels alone."""
    return build_wheel(copy / "kernels", tmp_path_factory.mktemp("kernels"))


def test_wheel_holds_both_packages_their_data_and_the_recipes(copy: Path, whole: Path) -> None:
    files = files_of(whole)
    expected = sources(copy / "r4b_core") | sources(copy / "kernels" / "r4b_kernels")
    assert expected - files == set()
    recipes = {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert len(recipes) > 10 and {f"r4b_core/{path}" for path in recipes} <= files
    for name in ("telemetry/templates/report.html.j2", "curate/stats/templates/stats.js", "curate/prompts/judge.txt"):
        assert f"r4b_core/{name}" in files
    assert "r4b_core/curate/verify/confusions.jsonl" in files
    foreign = {name.split("/")[0] for name in files} - {"r4b_core", "r4b_kernels"}
    assert [name for name in foreign if not name.endswith(".dist-info")] == []


def test_an_unpacked_wheel_finds_its_recipes(whole: Path, tmp_path: Path) -> None:
    """`r4b demo` must not need the checkout."""
    zipfile.ZipFile(whole).extractall(tmp_path / "site")
    program = (
        "import r4b_core.config.load as load, r4b_core.curate.recipe as curate;"
        "found = [load.load_recipe('demo').source, curate.load_curate_recipe('mmfr-123k').source];"
        f"assert all(str(p).startswith({str(tmp_path / 'site')!r}) for p in found), found"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=tmp_path, env=environment)


def test_kernels_wheel_holds_the_kernels_alone(copy: Path, kernels: Path) -> None:
    files = files_of(kernels)
    assert sources(copy / "kernels" / "r4b_kernels") - files == set()
    assert {name.split("/")[0].split("-")[0] for name in files} == {"r4b_kernels"}


@pytest.mark.parametrize("wheel", ["whole", "kernels"])
def test_wheels_hold_the_sources_of_csrc_and_what_was_compiled(wheel: str, request: pytest.FixtureRequest) -> None:
    """The object only where there is a compiler; the wheel is then for this kind of machine alone, yet any Python."""
    path = request.getfixturevalue(wheel)
    files = files_of(path)
    expected = {f"r4b_kernels/csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*.*")}
    assert expected - files == set() and any(name.endswith(".cpp") for name in expected)
    built = {name for name in files if name.startswith("r4b_kernels/_objects/")}
    assert built == (set() if build.why_not("cpu") else {f"r4b_kernels/_objects/{build.object_name('cpu')}"})
    assert path.name.split("-")[2:4] == ["py3", "none"] and path.name.endswith("-any.whl") == (not built)


def test_a_wheel_is_built_without_a_compiler(copy: Path, tmp_path: Path) -> None:
    project = shutil.copytree(
        copy / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("_objects", "build")
    )
    wheel = build_wheel(project, tmp_path / "wheels", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in files_of(wheel))


def test_kernels_depend_on_torch_only_and_agree_with_the_whole() -> None:
    kernels, whole = (
        tomllib.loads((ROOT / name).read_text())["project"] for name in ("kernels/pyproject.toml", "pyproject.toml")
    )
    assert [line for line in kernels["dependencies"] if not line.startswith("torch")] == []
    assert set(kernels["dependencies"]) <= set(whole["dependencies"])
    assert (kernels["version"], kernels["requires-python"]) == (whole["version"], whole["requires-python"])


def test_constraints_pin_every_dependency() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"]]
    for line in asked:
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # its other extras
            asked += [other for extra in sorted(requirement.extras) for other in extras[extra]]
            continue
        if requirement.name == "setuptools":  # pip freeze leaves it out
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The environment script in a folder of its own, with a Python that only writes down how it was called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_venv.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    fake.chmod(0o755)
    return tmp_path


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "scripts" / "setup_venv.sh"), "test"]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "VENV": ".venv", **environment}, check=False
    )


def test_setup_does_nothing_the_second_time(script: Path) -> None:
    assert setup(script).returncode == 0
    calls = (script / "calls").read_text()
    assert "--constraint constraints.txt --editable .[test]" in calls
    again = setup(script)
    assert (again.returncode, again.stdout, (script / "calls").read_text()) == (0, "", calls)


def test_setup_runs_again_when_the_constraints_changed(script: Path) -> None:
    setup(script)
    calls = (script / "calls").read_text()
    with (script / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    setup(script)
    assert len((script / "calls").read_text()) > len(calls)


def test_setup_says_which_python_it_needs(script: Path) -> None:
    shutil.rmtree(script / ".venv")
    result = setup(script, PYTHON="python-that-is-not-there")
    assert result.returncode == 1
    assert "needs Python 3.11 or 3.12; none of these is: python-that-is-not-there" in result.stderr
