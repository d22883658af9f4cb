"""Cases of two ranks. ``test_ranks`` runs this file under torchrun: both ranks run the same tests in the same order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from r4b_core.parallel import checkpoint
from r4b_core.parallel.checkpoint import CheckpointError, CheckpointWriteError
from r4b_core.parallel.learner import Learner, TrainingDiverged
from r4b_core.parallel.runtime import LayoutError, Runtime, start
from tests.parallel import harness
from tests.parallel.harness import Layout, Optim, compare_layouts, fill_by_name, parameters_by_name, train
from tests.parallel.toy import build_toy, toy_batches, toy_loss

LAYOUTS = {
    "dp2": Layout(),
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
}
SHARED = Path(os.environ["R4B_TEST_SHARED"]) if "R4B_TEST_SHARED" in os.environ else Path()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Any:
    """start() for a layout, stopped at the end whatever happens."""
    opened: list[Runtime] = []

    def open_layout(layout: Layout) -> Runtime:
        for runtime in opened:
            runtime.stop()
        opened[:] = [start(layout, seed=1)]
        return opened[0]

    yield open_layout
    for runtime in opened:
        runtime.stop()


def learner_of(runtime: Runtime, layout: Layout, optim: Any = None, fill: bool = True, **options: Any) -> Learner:
    config = options.pop("config", {})
    model = build_toy(layout, **config)
    if fill:
        fill_by_name(model)
    return Learner([model], runtime, optim or Optim(lr_scale={"vision": 0.1}), total_steps=20, **options)


def everyone(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def test_layouts_give_the_gradient_of_one_rank() -> None:
    compare_layouts(build_toy, toy_batches(4), toy_loss, LAYOUTS, tolerance=5e-6)


def test_harness_sees_a_wrong_gradient() -> None:
    def tilted(model: Any, batch: Any, output: Any) -> Any:
        loss, weight, metrics = toy_loss(model, batch, output)
        return loss * (1.001 if model.config.tensor_model_parallel_size == 2 else 1.0), weight, metrics

    with pytest.raises(AssertionError, match="tp2 differs"):
        compare_layouts(build_toy, toy_batches(2), tilted, {"tp2": Layout(tp=2)})


@pytest.mark.parametrize("name", ["dp2", "tp2_sp", "pp2"])
def test_distributed_optimizer_follows_one_rank(place: Any, name: str) -> None:
    batches, found = toy_batches(4), {}
    for key, layout in {"one": Layout(distributed_optimizer=False), "many": LAYOUTS[name]}.items():
        runtime = place(layout)
        learner = learner_of(runtime, layout, overlap_grad_reduce=name == "dp2" and key == "many")
        # In the reference both ranks compute everything: sums and denominators double together.
        results = [learner.step(batches, toy_loss) for _ in range(4)] if key == "one" else None
        found[key] = results or train(learner, runtime, batches, toy_loss, 4)
    for one, many in zip(found["one"], found["many"], strict=True):
        assert many.loss == pytest.approx(one.loss, rel=5e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=5e-6)
        assert many.lr == one.lr and not many.skipped


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_rank_reads_the_same_bits(place: Any, name: str) -> None:
    runtime = place(LAYOUTS[name])
    result = train(learner_of(runtime, LAYOUTS[name]), runtime, toy_batches(3), toy_loss, 1)[0]
    assert len({repr(value) for value in everyone(result)}) == 1
    assert result.metrics == {"tokens": 16.0 + 24.0 + 16.0}


def test_ranks_may_hold_different_numbers_of_micro_batches(place: Any) -> None:
    runtime = place(Layout())
    learner = learner_of(runtime, Layout())
    uneven = learner.step(toy_batches(3)[: 1 + runtime.rank], toy_loss)
    assert uneven.metrics["tokens"] == 16 + 16 + 24


def test_other_metric_names_on_one_rank_are_an_error_on_all(place: Any) -> None:
    runtime = place(Layout())

    def named(model: Any, batch: Any, output: Any) -> Any:
        loss, weight, _ = toy_loss(model, batch, output)
        return loss, weight, {f"rank{runtime.rank}": weight}

    with pytest.raises(ValueError, match="other metric names"):
        learner_of(runtime, Layout()).step(toy_batches(1), named)


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_all(place: Any, name: str) -> None:
    runtime = place(LAYOUTS[name])
    learner = learner_of(runtime, LAYOUTS[name], max_skipped=2)
    before = [parameter.clone() for parameter in learner.model.parameters()]
    batches = toy_batches(2)
    batches[1].weights[0] = float("nan")
    result = train(learner, runtime, batches, toy_loss, 1)[0]
    assert result.skipped and "finite" in result.reason
    for old, new in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not train(learner, runtime, toy_batches(2), toy_loss, 1)[0].skipped
    with pytest.raises(TrainingDiverged, match="2 updates in a row"):
        train(learner, runtime, batches, toy_loss, 2)


def test_forward_only_tells_the_first_stage(place: Any) -> None:
    runtime = place(Layout(pp=2))
    learner = learner_of(runtime, Layout(pp=2))

    def outputs(model: Any, batch: Any, output: Any) -> Any:
        return {"logits": output[:, 0], "tokens": batch.num_tokens}

    batches = toy_batches(2)
    alone = learner.forward_only(batches, outputs)
    assert (alone is None) == runtime.is_first_stage
    told = learner.forward_only(batches, outputs, broadcast=True)
    assert [entry["tokens"] for entry in told] == [16, 24]
    first, second = everyone([entry["logits"].tolist() for entry in told])
    assert first == second
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_a_reference_model_runs_through_the_same_schedule(place: Any) -> None:
    runtime = place(Layout(pp=2))
    learner, reference = learner_of(runtime, Layout(pp=2)), build_toy(Layout(pp=2))
    fill_by_name(reference)

    def logits(model: Any, batch: Any, output: Any) -> Any:
        return output[:, 0]

    batches = toy_batches(3)
    mine = learner.forward_only(batches, logits, broadcast=True)
    theirs = learner.forward_only(batches, logits, model=reference, broadcast=True)
    assert [len(entry) for entry in theirs] == [16, 24, 16]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_part_that_lies_on_one_stage_can_be_frozen(place: Any) -> None:
    runtime = place(Layout(pp=2))
    learner = learner_of(runtime, Layout(pp=2), Optim(), freeze=["vision"])
    before = parameters_by_name(learner.model)
    train(learner, runtime, toy_batches(2), toy_loss, 2)
    after = parameters_by_name(learner.model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"vision.weight", "vision.bias"}
    with pytest.raises(ValueError, match="'visoin'"):
        learner_of(runtime, Layout(pp=2), Optim(), freeze=["visoin"])


def test_a_layout_that_does_not_divide_is_refused_before_anything_starts() -> None:
    with pytest.raises(LayoutError, match=r"does not divide the 2 ranks"):
        start(Layout(tp=3), seed=1)
    with pytest.raises(LayoutError, match="sequence_parallel"):
        start(Layout(sequence_parallel=True), seed=1)


def test_starting_again_leaks_no_descriptor_and_no_thread(place: Any) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def use(name: str) -> None:
        runtime = place(LAYOUTS[name])
        train(learner_of(runtime, LAYOUTS[name]), runtime, toy_batches(2), toy_loss, 1)

    use("tp2")
    use("pp2")
    before = held()
    for _ in range(3):
        use("tp2")
        use("pp2")
    after = held()
    assert all(now <= then + 2 for now, then in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize(
    "saved,loaded",
    [("tp2_sp", "dp2"), ("dp2", "pp2"), ("pp2", "tp2"), ("dp2", "dp2"), ("pp2", "pp2"), ("tp2_sp", "tp2_sp")],
)
def test_a_checkpoint_continues_in_any_layout(place: Any, saved: str, loaded: str) -> None:
    batches, folder = toy_batches(4), SHARED / f"{saved}-{loaded}"
    runtime = place(LAYOUTS[saved])
    dropout = {"hidden_dropout": 0.1} if saved == loaded else {}
    learner = learner_of(runtime, LAYOUTS[saved], config=dropout)
    train(learner, runtime, batches, toy_loss, 2)
    path = checkpoint.save(folder, 2, learner, {"position": 7})
    weights = parameters_by_name(learner.model)
    expected = train(learner, runtime, batches, toy_loss, 2)
    final = parameters_by_name(learner.model)
    draw = torch.rand(3)

    runtime = place(LAYOUTS[loaded])
    again = learner_of(runtime, LAYOUTS[loaded], fill=False, config=dropout)
    assert checkpoint.load(path, again) == {"position": 7}
    restored = parameters_by_name(again.model)
    assert all(torch.equal(restored[name], value) for name, value in weights.items())
    continued = train(again, runtime, batches, toy_loss, 2)
    if saved == loaded:
        assert [repr(result) for result in continued] == [repr(result) for result in expected]
        assert all(torch.equal(parameters_by_name(again.model)[name], value) for name, value in final.items())
        assert torch.equal(torch.rand(3), draw)
    else:
        for result, truth in zip(continued, expected, strict=True):
            assert result.loss == pytest.approx(truth.loss, rel=5e-6)


def test_a_failed_write_on_one_rank_is_the_same_error_on_all(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SHARED / "full"
    runtime = place(Layout())
    learner = learner_of(runtime, Layout())
    train(learner, runtime, toy_batches(2), toy_loss, 1)
    checkpoint.save(folder, 1, learner, {})
    if runtime.rank == 1:
        monkeypatch.setattr(
            checkpoint.rng, "capture", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    with pytest.raises(CheckpointWriteError, match="rank 1.*No space left.*training can go on"):
        checkpoint.save(folder, 2, learner, {})
    runtime.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001"]
    monkeypatch.undo()
    train(learner, runtime, toy_batches(2), toy_loss, 1)
    assert checkpoint.save(folder, 2, learner, {}) == checkpoint.latest(folder)


def test_damage_is_the_same_error_on_all(place: Any) -> None:
    folder = SHARED / "damage"
    runtime = place(Layout())
    learner = learner_of(runtime, Layout())
    path = checkpoint.save(folder, 1, learner, {})
    if runtime.is_main:
        with (path / "__0_0.distcp").open("r+b") as stream:
            stream.seek(100)
            stream.write(b"\xff\x00\xff")
    runtime.barrier()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp was changed"):
        checkpoint.load(path, learner)
    assert len(set(everyone("reached"))) == 1


def test_weights_load_into_another_layout_without_an_optimizer(place: Any) -> None:
    runtime = place(LAYOUTS["tp2"])
    learner = learner_of(runtime, LAYOUTS["tp2"])
    train(learner, runtime, toy_batches(2), toy_loss, 1)
    path = checkpoint.save(SHARED / "weights", 1, learner, {})
    weights = parameters_by_name(learner.model)
    place(LAYOUTS["pp2"])
    model = build_toy(LAYOUTS["pp2"])
    checkpoint.load_weights(path, [model])
    assert all(torch.equal(value, weights[name]) for name, value in harness.parameters_by_name(model).items())


def test_tensor_ranks_draw_apart_and_data_ranks_alike(place: Any) -> None:
    place(Layout())
    first, second = everyone(torch.rand(2).tolist())
    assert first == second
