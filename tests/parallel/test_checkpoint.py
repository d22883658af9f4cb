from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from r4b_core.parallel import checkpoint, manifest, sharded_files
from r4b_core.parallel.checkpoint import CheckpointError, CheckpointWriteError
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import Runtime, start
from tests.parallel.harness import Layout, Optim, fill_by_name
from tests.parallel.launch import environment, run_python
from tests.parallel.toy import build_toy, toy_batches, toy_loss

RUN = """
import random, sys, numpy, torch
from r4b_core.parallel import checkpoint
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import start
from tests.parallel.harness import Layout, Optim, fill_by_name
from tests.parallel.toy import build_toy, toy_batches, toy_loss
folder, steps, every, whole = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "whole"
layout = Layout(distributed_optimizer=not whole)
runtime = start(layout, seed=5)
model = build_toy(layout, hidden_dropout=0.1)
fill_by_name(model)
learner = Learner([model], runtime, Optim(), total_steps=steps)
path = checkpoint.latest(folder)
first = checkpoint.load(path, learner)["step"] if path else 0
print("from", first, flush=True)
for step in range(first, steps):
    draws = (random.random(), numpy.random.rand(), torch.rand(1).item())
    result = learner.step(toy_batches(2, seed=int(draws[0] * 1e6)), toy_loss)
    print("step", step, result.loss.hex(), result.grad_norm.hex(), draws, flush=True)
    if every and (step + 1) % every == 0:
        checkpoint.save(folder, step + 1, learner, {"step": step + 1})
state = learner.optimizer.optimizer.state_dict()["state"]
tensors = [p.detach() for p in model.parameters()] + [t for s in state.values() for t in s.values()]
print("sum", [t.double().sum().item().hex() for t in tensors])
"""


def lines(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(word)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six steps in one process that never saves."""
    done = run_python(RUN, str(tmp_path_factory.mktemp("none")), "6", "0", "distributed")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_steps_a_fresh_process_and_three_equal_six(tmp_path: Path, straight: str) -> None:
    first = run_python(RUN, str(tmp_path), "6", "3", "distributed")
    assert lines(first.stdout, "step") == lines(straight, "step"), first.stderr
    shutil.rmtree(tmp_path / "step_00000006")
    second = run_python(RUN, str(tmp_path), "6", "3", "distributed")
    assert lines(second.stdout, "from") == ["from 3"], second.stderr
    assert lines(second.stdout, "step") == lines(straight, "step")[3:]
    assert lines(second.stdout, "sum") == lines(straight, "sum")


def test_killed_while_it_saves_it_continues_bit_for_bit(tmp_path: Path, straight: str) -> None:
    seen: dict[str, str] = {}
    for steps_before_kill, delay in ((2, 0.004), (3, 0.03)):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), "6", "1", "distributed"],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                assert seen.setdefault(line.split()[1], line.strip()) == line.strip()
                steps_before_kill -= 1
            if steps_before_kill == 0:
                # The step was printed and its save has begun: the signal falls into it, or just behind.
                time.sleep(delay)
                process.kill()
                break
        process.stdout.close()
        process.wait()
    last = run_python(RUN, str(tmp_path), "6", "1", "distributed")
    for line in lines(last.stdout, "step"):
        assert seen.setdefault(line.split()[1], line) == line
    assert list(seen.values()) == lines(straight, "step"), last.stderr
    assert lines(last.stdout, "sum") == lines(straight, "sum")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000006"]


@pytest.mark.parametrize("runtime", [Layout(), Layout(distributed_optimizer=False)], indirect=True)
def test_a_fresh_learner_continues_bit_for_bit(make_learner: Callable, runtime: Runtime, tmp_path: Path) -> None:
    learner = make_learner(hidden_dropout=0.1)
    learner.step(toy_batches(2), toy_loss)
    path = checkpoint.save(tmp_path, 1, learner, {})
    expected = [learner.step(toy_batches(2, seed), toy_loss) for seed in range(3)]
    again = make_learner(hidden_dropout=0.1)
    checkpoint.load(path, again)
    assert [again.step(toy_batches(2, seed), toy_loss) for seed in range(3)] == expected
    for one, other in zip(learner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def saved(make_learner: Callable, tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    learner = make_learner()
    learner.step(toy_batches(1), toy_loss)
    checkpoint.save(tmp_path, 1, learner, {"epoch": 0})
    learner.step(toy_batches(1), toy_loss)
    yield checkpoint.save(tmp_path, 2, learner, {"epoch": 0, "list": [1, 2.5, None]}), learner


def test_contents_and_state(saved: tuple[Path, Any]) -> None:
    path, learner = saved
    assert checkpoint.latest(path.parent) == path and path.name == "step_00000002"
    facts = json.loads((path / "manifest.json").read_text())
    assert facts["step"] == 2 and facts["layout"]["world"] == 1 and facts["versions"]["megatron-core"]
    assert set(facts["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert checkpoint.read_state(path) == {"epoch": 0, "list": [1, 2.5, None]}
    assert checkpoint.load(path, learner) == {"epoch": 0, "list": [1, 2.5, None]}
    assert learner.step_count == 2
    assert b"/" + str(path.parent.name).encode() not in (path / ".metadata").read_bytes()


def test_an_altered_state_is_not_read(saved: tuple[Path, Any]) -> None:
    flip(saved[0] / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json was changed"):
        checkpoint.read_state(saved[0])


def test_no_object_is_pickled(saved: tuple[Path, Any]) -> None:
    contents = sharded_files.read_metadata(saved[0])
    assert all(type(entry).__name__ == "TensorStorageMetadata" for entry in contents.state_dict_metadata.values())


def test_keep_and_saving_a_step_again(make_learner: Callable, tmp_path: Path) -> None:
    learner = make_learner()
    for step in (1, 2, 3, 3):
        checkpoint.save(tmp_path, step, learner, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert checkpoint.latest(tmp_path / "absent") is None


def test_what_cannot_be_saved_is_refused_before_anything_is_written(make_learner: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state cannot be saved as JSON"):
        checkpoint.save(tmp_path, 1, make_learner(), {"loss": torch.ones(1)})
    with pytest.raises(ValueError, match=r"checkpoint\.keep = 0"):
        checkpoint.save(tmp_path, 1, make_learner(), {}, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_folder_is_never_the_latest(saved: tuple[Path, Any]) -> None:
    path, learner = saved
    for name in ("step_00000009.tmp-abc", "step_00000009", "step_latest"):
        shutil.copytree(path, path.parent / name)
    (path.parent / "step_00000009" / "manifest.json").unlink()
    assert checkpoint.latest(path.parent) == path
    checkpoint.remove_leftovers(path.parent)
    assert not (path.parent / "step_00000009.tmp-abc").exists()
    with pytest.raises(CheckpointError, match="unfinished checkpoint has none"):
        checkpoint.load(path.parent / "step_00000009", learner)
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        checkpoint.load(path.parent / "step_00000077", learner)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "state.json", "rng_00000.json"])
@pytest.mark.parametrize(
    "damage,words",
    [(Path.unlink, "is missing"), (cut, "bytes instead of"), (flip, "SHA-256"), (link, "not a plain file")],
)
def test_damage_names_the_file_and_the_way_out(
    saved: tuple[Path, Any], name: str, damage: Callable[[Path], None], words: str
) -> None:
    path, learner = saved
    before = [parameter.clone() for parameter in learner.model.parameters()]
    damage(path / name)
    with pytest.raises(CheckpointError, match=f"{name}.*{words}.*go on from another step, for instance step_00000001"):
        checkpoint.load(path, learner)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert checkpoint.load(path.parent / "step_00000001", learner) == {"epoch": 0}


def test_a_foreign_file_or_a_torn_manifest_is_refused(saved: tuple[Path, Any]) -> None:
    path, learner = saved
    (path / "__0_9.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not in the manifest"):
        checkpoint.load(path, learner)
    cut(path / "manifest.json")
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        checkpoint.load(path, learner)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["R4B_TEST_BOMB"],)


def forge(path: Path, name: str, data: bytes) -> None:
    """Replace a file and its entry in the manifest, as one who can write to the folder would."""
    (path / name).write_bytes(data)
    facts = json.loads((path / "manifest.json").read_text())
    facts["files"].update(manifest.describe(path, [name]))
    (path / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_code_in_a_pickle_does_not_run(
    saved: tuple[Path, Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, learner = saved
    monkeypatch.setenv("R4B_TEST_BOMB", str(tmp_path / "exploded"))
    if name == "common.pt":
        torch.save({"optimizer": Bomb()}, path / "bomb")
        data = (path / "bomb").read_bytes()
        (path / "bomb").unlink()
    else:
        data = pickle.dumps(Bomb())
    forge(path, name, data)
    for load in (lambda: checkpoint.load(path, learner), lambda: checkpoint.load_weights(path, learner.chunks)):
        with pytest.raises(CheckpointError, match=f"{name} is refused"):
            load()
    assert not (tmp_path / "exploded").exists()


def test_a_table_of_contents_cannot_point_outside(saved: tuple[Path, Any]) -> None:
    path, learner = saved
    contents = sharded_files.read_metadata(path)
    next(iter(contents.storage_data.values())).relative_path = "../step_00000001/__0_0.distcp"
    forge(path, ".metadata", pickle.dumps(contents))
    with pytest.raises(CheckpointError, match="outside the folder"):
        checkpoint.load(path, learner)


@pytest.mark.parametrize(
    "theirs,ours,words",
    [
        ({}, dict(num_layers=4), "of another shape"),
        ({}, dict(ffn_hidden_size=96), r"linear_fc1\.weight \[2, 128, 32\] instead of \[2, 192, 32\]"),
        (dict(add_qkv_bias=True), {}, r"extra: .*linear_qkv\.bias"),
        ({}, dict(add_qkv_bias=True), r"missing: .*linear_qkv\.bias"),
    ],
)
def test_another_model_is_refused_with_the_names(
    make_learner: Callable, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], words: str
) -> None:
    path = checkpoint.save(tmp_path, 1, make_learner(**theirs), {})
    other = make_learner(**ours)
    for load in (lambda: checkpoint.load(path, other), lambda: checkpoint.load_weights(path, other.chunks)):
        with pytest.raises(CheckpointError, match=f"of another model.*{words}"):
            load()


def test_weights_alone_ignore_the_optimizer(saved: tuple[Path, Any], runtime: Runtime) -> None:
    path, learner = saved
    model = build_toy(Layout())
    checkpoint.load_weights(path, [model])
    for (name, one), (_, other) in zip(model.named_parameters(), learner.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_weights_change_their_type(saved: tuple[Path, Any], runtime: Runtime) -> None:
    model = build_toy(Layout(), params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16)
    checkpoint.load_weights(saved[0], [model])
    assert torch.equal(model.embedding.weight, saved[1].model.embedding.weight.bfloat16())


def test_another_recipe_overrides_the_stored_rates(saved: tuple[Path, Any], make_learner: Callable) -> None:
    learner = make_learner(Optim(lr=0.5, weight_decay=0.3, schedule="constant", warmup_steps=0))
    checkpoint.load(saved[0], learner)
    learner.step(toy_batches(1), toy_loss)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in learner.optimizer.param_groups} == {0.3, 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [True, False])
def test_either_kind_of_optimizer_reads_the_other(distributed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights, their float32 masters, moments and steps all count in what comes after."""
    optim = Optim(lr_scale={"vision": 0.1, "embedding": 0.0}, constant=["vision"])
    losses = {}
    for kind in (distributed, not distributed):
        layout = Layout(distributed_optimizer=kind)
        runtime = start(layout, seed=1)
        try:
            model = build_toy(layout, params_dtype=dtype, bf16=dtype == torch.bfloat16)
            fill_by_name(model)
            learner = Learner([model], runtime, optim, total_steps=10)
            if kind == distributed:
                for _ in range(3):
                    learner.step(toy_batches(2), toy_loss)
                path = checkpoint.save(tmp_path, 3, learner, {})
            else:
                checkpoint.load(path, learner)
            losses[kind] = [learner.step(toy_batches(2), toy_loss).loss for _ in range(3)]
        finally:
            runtime.stop()
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


def test_a_checkpoint_from_before_interleaving_is_of_this_layout(saved: tuple[Path, Any]) -> None:
    path, learner = saved
    facts = json.loads((path / manifest.MANIFEST).read_text())
    assert facts["layout"].pop("virtual_stages") == 1
    (path / manifest.MANIFEST).write_text(json.dumps(facts))
    drawn = torch.rand(3)
    checkpoint.load(path, learner)
    assert torch.equal(torch.rand(3), drawn)  # restored, where another layout would be seeded anew


@pytest.fixture
def small_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_leaves_nothing_and_training_goes_on(make_learner: Callable, tmp_path: Path) -> None:
    learner = make_learner()
    learner.step(toy_batches(1), toy_loss)
    with pytest.raises(CheckpointWriteError, match="File too large.*training can go on"):
        checkpoint.save(tmp_path, 1, learner, {})
    assert list(tmp_path.iterdir()) == []
    assert not learner.step(toy_batches(1), toy_loss).skipped


@pytest.mark.parametrize("name", ["publish", "write_json", "make_aside"])
def test_a_full_disk_late_in_the_save(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, learner = saved

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, name, full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        checkpoint.save(path.parent, 3, learner, {})
    monkeypatch.undo()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["step_00000001", "step_00000002"]
    assert checkpoint.save(path.parent, 3, learner, {}).name == "step_00000003"


def test_saving_leaks_nothing_and_starts_no_process(make_learner: Callable, tmp_path: Path) -> None:
    import psutil

    learner, me = make_learner(), psutil.Process()
    checkpoint.save(tmp_path, 1, learner, {})
    before = (me.num_fds(), me.num_threads(), len(me.children(recursive=True)))
    for step in range(2, 6):
        path = checkpoint.save(tmp_path, step, learner, {})
        checkpoint.load(path, learner)
    assert (me.num_fds(), me.num_threads(), len(me.children(recursive=True))) == before
