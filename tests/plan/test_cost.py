"""Memory and time on layouts small enough to work out by hand, and the directions in which they must move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from r4b_core.plan import machine
from r4b_core.plan.cost import model_flops_utilization, step_time
from r4b_core.plan.machine import H100, H200
from r4b_core.plan.memory import Memory, layer_bytes, stage_memory, worst_stage
from r4b_core.plan.shapes import SHAPES, Decoder, ModelShape
from r4b_core.plan.work import Execution, Layout, Work, causal_pairs, step_flops

# 4 layers of 8 x 8 x (2 + 2 x 0.5) + 3 x 8 x 16 = 576 entries, 16 of norms; tables of 10 x 8; 8 of the last norm.
TINY = ModelShape("tiny", Decoder(4, 8, 16, 2, 1, 4, 10, tied=False))
TEXT = Work(micro_batches=2, tokens=64, pairs=causal_pairs(64, 16), loss_rows=64)
LLAMA = SHAPES["llama3.1-8b"]
LONG = Work(micro_batches=8, tokens=8192, pairs=causal_pairs(8192, 8192), loss_rows=8192)


def test_states_of_the_distributed_optimizer() -> None:
    """2 bytes of weight and 4 of gradient everywhere, 12 of master copy and moments split over dp and cp."""
    parameters = TINY.parameters
    assert parameters == 4 * (576 + 16) + 2 * 80 + 8
    memory = stage_memory(TINY, Layout(dp=2, cp=2), Execution(), TEXT, 0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * parameters, 4 * parameters, 3 * parameters)
    whole = stage_memory(TINY, Layout(dp=4), Execution(sharding="none"), TEXT, 0)
    assert whole.optimizer == 12 * parameters
    single = stage_memory(TINY, Layout(dp=4), Execution(dtype="float32"), TEXT, 0)
    assert (single.weights, single.optimizer) == (4 * parameters, 2 * parameters)


def test_frozen_parts_have_no_gradients_and_a_reference_has_weights() -> None:
    frozen = stage_memory(TINY, Layout(), Execution(train_decoder=False), TEXT, 0)
    assert frozen.gradients == frozen.optimizer == 0 < frozen.weights
    doubled = stage_memory(TINY, Layout(), Execution(reference_copy=True), TEXT, 0)
    assert doubled.weights == 2 * frozen.weights


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [("none", 2 * (32 + 3 * 8 + 3 * 4 + 3 * 16)), ("selective", 2 * (16 + 16 + 8 + 32)), ("full", 2 * 8)],
)
def test_bytes_that_a_layer_keeps_of_a_token(recompute: str, expected: int) -> None:
    assert layer_bytes(TINY.decoder, recompute, 1, False) == expected  # type: ignore[arg-type]


def test_tensor_parallel_ranks_share_the_stream_only_with_sequence_parallelism() -> None:
    whole = layer_bytes(TINY.decoder, "none", 1, False)
    assert layer_bytes(TINY.decoder, "none", 2, True) == whole / 2
    assert layer_bytes(TINY.decoder, "none", 2, False) == whole / 2 + 2 * 4 * 8 / 2


def test_activations_by_hand() -> None:
    """Kept of four layers, twice all of the layer under work; two micro-batches alive on the first of two stages."""
    kept = layer_bytes(TINY.decoder, "selective", 1, False)
    working = layer_bytes(TINY.decoder, "none", 1, False)
    execution = Execution(recompute="selective")
    assert stage_memory(TINY, Layout(), execution, TEXT, 0).activations == 64 * (4 * kept + 2 * working)
    first, last = (stage_memory(TINY, Layout(pp=2), execution, TEXT, stage).activations for stage in (0, 1))
    assert first == 64 * (2 * 2 * kept + 2 * working)
    assert last == 64 * (2 * kept + 2 * working)
    assert stage_memory(TINY, Layout(cp=2, dp=2), execution, TEXT, 0).activations == 32 * (4 * kept + 2 * working)


def test_only_the_last_stage_has_a_head_and_only_the_first_sees() -> None:
    shape = SHAPES["qwen3_vl-8b"]
    work = replace(LONG, patches=4096.0, vision_pairs=1e6)
    first, last = (stage_memory(shape, Layout(pp=2), Execution(), work, stage) for stage in (0, 1))
    assert first.head == last.vision == 0 < min(first.vision, last.head)
    assert worst_stage(shape, Layout(pp=2), Execution(), work).total == max(first.total, last.total)


def test_a_fused_head_needs_no_logits() -> None:
    whole = stage_memory(LLAMA, Layout(), Execution(fused_head=False), LONG, 0).head
    fused = stage_memory(LLAMA, Layout(), Execution(), LONG, 0).head
    assert whole > 12 * 8192 * 128256 > 4 * fused


def test_rollouts_count_what_they_need_beyond_the_update() -> None:
    work = replace(
        LONG, tokens=16.0, loss_rows=16.0, prompts=32, prompt_tokens=4096, responses=64, response_tokens=2048
    )
    entry = 2 * 2 * 32 * 1024
    cache = entry * (32 * 4096 + 64 * 2048) + 4 * 64 * 128256
    memory = stage_memory(LLAMA, Layout(), Execution(), work, 0)
    assert memory.rollout == pytest.approx(cache - memory.activations - memory.head)


def test_the_total_has_room_for_cuda_and_fragments() -> None:
    assert Memory(1e9, 1e9, 0, 0, 0, 0, 0).total == pytest.approx(2.1e9 + 3 * 2**30)


def test_time_of_linear_layers_by_hand() -> None:
    parts = step_time(LLAMA, Layout(), Execution(), LONG, H100).parts
    flops = 6 * 8 * 8192 * 32 * LLAMA.decoder.layer_matrices
    assert parts["matrix products"] == pytest.approx(flops / (0.6 * 989e12))
    again = step_time(LLAMA, Layout(), Execution(recompute="full"), LONG, H100).parts
    assert again["matrix products"] == pytest.approx(flops * 8 / 6 / (0.6 * 989e12))
    frozen = step_time(LLAMA, Layout(), Execution(train_decoder=False), LONG, H100).parts
    assert frozen["matrix products"] == pytest.approx(flops * 4 / 6 / (0.6 * 989e12))


def test_bubble_is_the_other_stages_once_and_interleaving_divides_it() -> None:
    """1F1B: (pp - 1) / m of the stages' time where they are equal."""
    even = replace(LONG, loss_rows=0.0)
    parts = step_time(LLAMA, Layout(pp=4), Execution(), even, H100).parts
    work = sum(seconds for name, seconds in parts.items() if name not in ("bubble", "optimizer"))
    assert parts["bubble"] == pytest.approx(work * 3 / 8)
    two = step_time(LLAMA, Layout(pp=4, interleave=2), Execution(), even, H100).parts
    work = sum(seconds for name, seconds in two.items() if name not in ("bubble", "optimizer"))
    assert two["bubble"] == pytest.approx(work * 3 / (2 * 8))


def test_interleaving_runs_whole_rounds() -> None:
    times = [
        step_time(LLAMA, Layout(pp=4, interleave=2), Execution(), replace(LONG, micro_batches=count), H100).parts
        for count in (5, 8)
    ]
    assert times[0]["matrix products"] == times[1]["matrix products"]


def test_tensor_parallel_traffic_by_hand() -> None:
    """Four collectives forward, six backward: with sequence parallelism the input of two products is gathered again."""
    parts = step_time(LLAMA, Layout(tp=2, sequence_parallel=True), Execution(), LONG, H100).parts
    volume = 8 * 8192 * 4096 * 2 / 2
    assert parts["tensor parallel"] == pytest.approx(10 * 32 * volume / (0.75 * 450e9))


def test_context_parallel_traffic_by_hand() -> None:
    """q, k, v and the output change hands once forward and once backward; full recompute repeats the forward's."""
    layout = Layout(cp=2)
    volume = 8 * 8192 / 2 * (2 * 4096 + 2 * 1024) * 2 / 2
    for recompute, times in (("none", 2), ("full", 3)):
        execution = Execution(recompute=recompute)  # type: ignore[arg-type]
        parts = step_time(LLAMA, layout, execution, LONG, H100).parts
        assert parts["context parallel"] == pytest.approx(times * 32 * volume / (0.75 * 450e9))


def test_head_by_hand() -> None:
    """Fused: the logits are computed twice, so four times the forward's product; whole: three times, and more bytes."""
    logits = 8 * 8192 * 128256
    for fused, products, moved in ((True, 4, 16), (False, 3, 34)):
        parts = step_time(LLAMA, Layout(), Execution(fused_head=fused), LONG, H100).parts
        expected = products * 2 * 4096 * logits / (0.6 * 989e12) + moved * logits / (0.8 * 3.35e12)
        assert parts["head"] == pytest.approx(expected)


def test_data_parallel_by_hand() -> None:
    """Gradients to their shards in float32 and weights back in bfloat16; without shards twice the gradients."""
    count = LLAMA.parameters - 4096
    for sharding, width in (("zero1", 6), ("none", 8)):
        execution = Execution(sharding=sharding)  # type: ignore[arg-type]
        parts = step_time(LLAMA, Layout(dp=8), execution, LONG, H100).parts
        assert parts["data parallel"] == pytest.approx(width * count * 7 / 8 / (0.75 * 450e9))
    beside = step_time(LLAMA, Layout(dp=8), Execution(overlap_data=True), LONG, H100).parts
    assert beside["data parallel"] == pytest.approx(6 * count * 7 / 8 / (0.75 * 450e9) / 2)


def test_optimizer_by_hand() -> None:
    """30 bytes of each parameter's state on its shard, 8 of every gradient."""
    count = LLAMA.parameters - 4096
    parts = step_time(LLAMA, Layout(dp=8), Execution(), LONG, H100).parts
    assert parts["optimizer"] == pytest.approx((30 / 8 + 8) * count / (0.8 * 3.35e12))


def test_scoring_is_a_forward_pass_each() -> None:
    once, twice = (
        step_time(LLAMA, Layout(pp=2), Execution(), replace(LONG, scored=scored), H100).parts for scored in (1, 2)
    )
    assert twice["scoring"] == pytest.approx(2 * once["scoring"])
    training = sum(seconds for name, seconds in once.items() if name not in ("scoring", "optimizer"))
    assert 0.25 * training < once["scoring"] < 0.35 * training


def test_gradients_across_nodes_go_through_every_network_card() -> None:
    assert H100.ring(8) == H100.ring(2, 4) == 0.75 * 450e9
    assert H100.ring(16) == 0.75 * 8 * 50e9
    assert H100.ring(4, 8) == 0.75 * 50e9


def test_uneven_lengths_cost_less_with_more_samples() -> None:
    def lost(samples: float) -> float:
        execution = Execution(varying=True)
        return step_time(LLAMA, Layout(dp=8), execution, replace(LONG, samples=samples), H100).parts["uneven ranks"]

    assert lost(16) == pytest.approx(2 * lost(64))


def test_a_rollout_reads_the_weights_for_every_token() -> None:
    work = replace(LONG, prompts=1, prompt_tokens=100, responses=8, response_tokens=50)
    slow = step_time(LLAMA, Layout(), Execution(), work, H100).parts["rollouts"]
    weights = 2 * (LLAMA.parameters - LLAMA.decoder.embedding_parameters)
    assert slow > 50 * weights / H100.bandwidth
    assert step_time(LLAMA, Layout(), Execution(), work, H200).parts["rollouts"] < slow


def test_launches_count_only_where_the_gpu_is_faster() -> None:
    tiny = step_time(TINY, Layout(), Execution(), TEXT, H100)
    once = machine.KERNELS_PER_FUSED_LAYER * 3 * 4 * machine.LAUNCH_SECONDS
    assert tiny.total == pytest.approx(2 * once + tiny.parts["optimizer"])
    assert "launches" not in step_time(LLAMA, Layout(), Execution(), LONG, H100).parts
    eager = step_time(LLAMA, Layout(), Execution(fused=False), LONG, H100).parts
    assert eager["launches"] == pytest.approx(8 * machine.KERNELS_PER_EAGER_LAYER * 3 * 32 * machine.LAUNCH_SECONDS)


def test_utilization_is_flops_over_the_data_sheet() -> None:
    seconds = step_time(LLAMA, Layout(), Execution(), LONG, H100).total
    expected = step_flops(LLAMA, LONG) / (seconds * 989e12)
    assert model_flops_utilization(LLAMA, Layout(), LONG, H100, seconds) == pytest.approx(expected)
    assert 0.2 < expected < machine.MATMUL
