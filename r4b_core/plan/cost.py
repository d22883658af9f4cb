"""How long a step takes: FLOPs over rates, bytes over links, the pipeline's bubble. Constants: ``machine``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

from r4b_core.plan import machine
from r4b_core.plan.machine import GPU
from r4b_core.plan.memory import DECODE_BATCH, stage_parameters, trained_parameters
from r4b_core.plan.shapes import ModelShape
from r4b_core.plan.work import Execution, Layout, Work, filled_micro_batches, forward_flops, step_flops

# Bytes that move per logit around the head's products: written and read in float32, the gradient in half precision.
FUSED_LOGIT_BYTES = 16
WHOLE_LOGIT_BYTES = 34
# AdamW per parameter: gradient, master copy and two moments read, the latter three and the weight written.
OPTIMIZER_BYTES = 30
# Kernels of one decoder layer for one decoded token.
DECODE_KERNELS = 12


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the critical path, by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def step_time(shape: ModelShape, layout: Layout, execution: Execution, work: Work, gpu: GPU) -> StepTime:
    """One step of one data-parallel rank, rollouts and scoring included."""
    stages = [_micro_batch(shape, layout, execution, work, gpu, stage) for stage in range(layout.pp)]
    slowest = max(stages, key=_total)
    compute = _total(slowest)
    count = filled_micro_batches(layout, work.micro_batches)
    parts = {name: seconds * count for name, seconds in slowest.items()}
    parts["bubble"] = (sum(map(_total, stages)) - compute) / layout.interleave
    parts["data parallel"] = _data_parallel(shape, layout, execution, work, gpu, compute)
    parts["optimizer"] = _optimizer(shape, layout, execution, gpu)
    if execution.varying and layout.dp > 1:
        # Expected maximum of dp normal variables (Blom, 1958).
        spread = NormalDist().inv_cdf((layout.dp - 0.375) / (layout.dp + 0.25))
        parts["uneven ranks"] = (
            compute * work.micro_batches * machine.LENGTH_VARIATION * spread / math.sqrt(max(1.0, work.samples))
        )
    parts = {name: seconds * work.updates for name, seconds in parts.items()}
    if work.scored:
        forward = [_micro_batch(shape, layout, execution, work, gpu, stage, False) for stage in range(layout.pp)]
        longest = max(map(_total, forward))
        parts["scoring"] = work.scored * (longest * count + (sum(map(_total, forward)) - longest) / layout.interleave)
    if work.responses:
        parts["rollouts"] = _rollouts(shape, layout, execution, work, gpu)
    return StepTime({name: seconds for name, seconds in parts.items() if seconds > 0})


def model_flops_utilization(shape: ModelShape, layout: Layout, work: Work, gpu: GPU, seconds: float) -> float:
    """Model FLOPs (causal half, no recomputation, ViT counted) over the bfloat16 data sheet."""
    return step_flops(shape, work) * layout.dp / (seconds * layout.gpus * gpu.bf16)


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _micro_batch(
    shape: ModelShape,
    layout: Layout,
    execution: Execution,
    work: Work,
    gpu: GPU,
    stage: int,
    backward: bool = True,
) -> dict[str, float]:
    """Seconds of one micro-batch on one stage by part, forward and (unless switched off) backward."""
    decoder = shape.decoder
    flops = forward_flops(shape, work)
    split = layout.tp * layout.cp
    matmul = gpu.flops(execution.precision) * machine.MATMUL
    linear = gpu.flops("fp8" if execution.fp8 else execution.precision) * machine.MATMUL
    repeated = execution.repeated if backward else 0.0
    passes = 2.0 + execution.train_decoder + repeated if backward else 1.0
    parts = {"matrix products": flops.linear / layout.pp / split * passes / linear}
    whole_layers = repeated if execution.recompute == "full" else 0.0
    attention = flops.attention / layout.pp / split
    parts["attention"] = attention * _attention(execution, gpu, 1 + whole_layers, backward)
    elementwise_passes = 3.0 + max(repeated, float(execution.recompute == "selective")) if backward else 1.0
    layers = decoder.num_layers / layout.pp
    moved = _layer_traffic(shape, layout, execution) * layers * work.tokens / layout.cp * elementwise_passes
    if not execution.fused:
        moved *= machine.EAGER_PASSES
    memory = gpu.bandwidth * machine.MEMORY
    parts["memory traffic"] = moved / memory
    if layout.tp > 1:
        collectives = 4 + (4 + 2 * layout.sequence_parallel + 4 * repeated if backward else 0)
        volume = work.tokens / layout.cp * decoder.hidden_size * execution.width * (layout.tp - 1) / layout.tp
        hidden = machine.EXPOSED_WHEN_OVERLAPPED if execution.overlap_tensor else 1.0
        parts["tensor parallel"] = collectives * layers * volume / gpu.ring(layout.tp) * hidden
    if layout.cp > 1:
        exchanges = 2 + repeated if backward else 1
        width = 2 * (decoder.query_size + decoder.kv_size) * execution.width / layout.tp
        volume = work.tokens / layout.cp * width * (layout.cp - 1) / layout.cp
        parts["context parallel"] = exchanges * layers * volume / gpu.ring(layout.cp, layout.tp)
    if layout.pp > 1:
        width = decoder.hidden_size * execution.width / (layout.tp if layout.sequence_parallel else 1)
        near = layout.gpus <= gpu.per_node
        link = (gpu.nvlink if near else gpu.network) * machine.LINK
        # Megatron-Core sends beside computation where the schedule is interleaved, and only there.
        exposed = machine.EXPOSED_WHEN_OVERLAPPED if layout.interleave > 1 else 1.0
        sends = (2 if backward else 1) * layout.interleave
        parts["pipeline sends"] = sends * work.tokens / layout.cp * width / link * exposed
    if stage == layout.pp - 1:
        head_passes = (4.0 if execution.fused_head else 3.0) if backward else 1.0
        if backward and not execution.train_decoder:
            head_passes -= 1
        bytes_per_logit = FUSED_LOGIT_BYTES if execution.fused_head else WHOLE_LOGIT_BYTES
        logits = work.loss_rows * decoder.vocab_size / split
        parts["head"] = flops.head / split * head_passes / matmul + logits * bytes_per_logit / memory
    if stage == 0 and shape.vision and work.patches:
        parts["vision"] = _vision(shape, layout, execution, work, gpu, backward)
    eyes = shape.vision.num_layers if "vision" in parts and shape.vision else 0
    kernels = machine.KERNELS_PER_FUSED_LAYER if execution.fused else machine.KERNELS_PER_EAGER_LAYER
    launches = kernels * elementwise_passes * (layers + eyes) * machine.LAUNCH_SECONDS
    parts["launches"] = max(0.0, launches - _total(parts)) if execution.fused else launches
    return parts


def _attention(execution: Execution, gpu: GPU, forwards: float, backward: bool) -> float:
    """Seconds per forward FLOP of attention."""
    native = execution.attention == "native" or (execution.attention == "flash2" and gpu.native_flash2)
    peak = gpu.flops(execution.precision) * (1.0 if native else machine.OTHER_ATTENTION_ON_HOPPER)
    seconds = forwards / (peak * machine.ATTENTION_FORWARD)
    if backward:
        seconds += machine.ATTENTION_BACKWARD_WORK / (peak * machine.ATTENTION_BACKWARD)
    return seconds


def _layer_traffic(shape: ModelShape, layout: Layout, execution: Execution) -> float:
    """Bytes per token that the memory-bound kernels of one layer's forward read and write, fused.

    Two norms with their residual sums 8H, rotation of q and k in place 2 (Q + K), SwiGLU 3F. FP8 adds casts of every
    product's operands in both layouts, spread over the three passes that this is multiplied by.
    """
    decoder = shape.decoder
    stream = layout.tp if layout.sequence_parallel else 1
    hidden, query, kv, ffn = decoder.hidden_size, decoder.query_size, decoder.kv_size, decoder.ffn_hidden_size
    moved = execution.width * (8 * hidden / stream + (2 * (query + kv) + 3 * ffn) / layout.tp)
    if execution.fp8:
        moved += 4 * (4 * hidden / stream + (2 * query + 2 * kv + 3 * ffn) / layout.tp) / 3
    return moved


def _vision(shape: ModelShape, layout: Layout, execution: Execution, work: Work, gpu: GPU, backward: bool) -> float:
    """Seconds of ViT and projector. Every context-parallel rank computes all patches; tensor-parallel ranks share."""
    vision = shape.vision
    assert vision is not None
    flops = forward_flops(shape, work)
    learns = backward and execution.train_vision
    passes = 3.0 + execution.repeated if learns else 1.0
    seconds = (flops.vision + flops.projector) / layout.tp * passes / (gpu.flops(execution.precision) * machine.MATMUL)
    again = 1 + (execution.repeated if learns and execution.recompute == "full" else 0.0)
    seconds += flops.vision_attention / layout.tp * _attention(execution, gpu, again, learns)
    width = (3 if vision.gated else 2) * vision.ffn_hidden_size
    moved = execution.width * (8 * vision.hidden_size + (4 * vision.hidden_size + width) / layout.tp)
    moved *= vision.num_layers * work.patches * passes * (1 if execution.fused else machine.EAGER_PASSES)
    seconds += moved / (gpu.bandwidth * machine.MEMORY)
    if layout.tp > 1:
        volume = work.patches * vision.hidden_size * execution.width * (layout.tp - 1) / layout.tp * vision.num_layers
        seconds += (8 if learns else 4) * volume / gpu.ring(layout.tp)
    return seconds


def _data_parallel(
    shape: ModelShape, layout: Layout, execution: Execution, work: Work, gpu: GPU, compute: float
) -> float:
    """Seconds of gradient reduction and weight gathering that nothing hides."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    parameters = sum(stage_parameters(shape, layout, 0).values())
    trained = trained_parameters(shape, layout, execution, 0)
    rate = gpu.ring(ranks, layout.tp) / ((ranks - 1) / ranks)
    if execution.sharding == "fsdp":
        seconds = (4 * parameters + 4 * trained) / rate
        times = work.micro_batches if execution.regather else 1
    else:
        # Gradients in float32 (DistributedDataParallelConfig.grad_reduce_in_fp32), weights back in their own dtype.
        # Without the distributed optimizer gradients are reduced to all, which is twice a reduction to shards.
        seconds = (4 + (execution.width if execution.sharding == "zero1" else 4)) * trained / rate
        times = 1
    if execution.overlap_data:
        seconds = max(machine.EXPOSED_WHEN_OVERLAPPED * seconds, seconds - compute)
    return times * seconds


def _optimizer(shape: ModelShape, layout: Layout, execution: Execution, gpu: GPU) -> float:
    trained = trained_parameters(shape, layout, execution, 0)
    shards = 1 if execution.sharding == "none" else layout.dp * layout.cp
    # The whole gradient is read for its norm and zeroed, where it is not sharded.
    gradient = 8 * trained / (shards if execution.sharding == "fsdp" else 1)
    return (OPTIMIZER_BYTES * trained / shards + gradient) / (gpu.bandwidth * machine.MEMORY)


def _rollouts(shape: ModelShape, layout: Layout, execution: Execution, work: Work, gpu: GPU) -> float:
    """Seconds to draw the responses with the trainer's own weights: every token reads all of them, and its keys."""
    decoder = shape.decoder
    prompts, responses = work.prompts / layout.cp, work.responses / layout.cp
    memory = gpu.bandwidth * machine.MEMORY
    parameters = decoder.num_layers * decoder.layer_parameters + decoder.embedding_parameters
    matmul = gpu.flops(execution.precision) * machine.MATMUL
    prefill = 2 * prompts * work.prompt_tokens * decoder.num_layers * decoder.layer_matrices / layout.tp / matmul
    together = min(DECODE_BATCH, max(1.0, responses))
    rounds = max(1.0, responses / DECODE_BATCH)
    entry = 2 * execution.width * decoder.num_layers * decoder.kv_size
    keys = together * entry * (work.prompt_tokens + work.response_tokens / 2)
    token = (execution.width * parameters + keys) / layout.tp / memory
    token += decoder.num_layers * DECODE_KERNELS * machine.LAUNCH_SECONDS
    return prefill + rounds * work.response_tokens * token
