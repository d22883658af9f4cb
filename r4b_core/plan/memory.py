"""Bytes that one GPU holds at the worst moment of a step, by part and by pipeline stage.

B = 2 bytes of a bfloat16 activation. Letters: H hidden, Q and K widths of all query and of all key heads, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from r4b_core.plan.machine import FRAGMENTATION, GPU, RESERVED_BYTES
from r4b_core.plan.shapes import Decoder, ModelShape, Vision
from r4b_core.plan.work import Execution, Layout, Recompute, Work, filled_micro_batches

# The fused head holds one chunk of float32 logits (r4b_kernels.head_chunks) and its half-precision gradient.
HEAD_CHUNK_BYTES = 1.5 * 2**30
# The unfused one: logits in bfloat16 and float32, the float32 gradient, its bfloat16 copy.
WHOLE_LOGIT_BYTES = 12
# Responses that the embedded engine decodes together on one data-parallel rank (rollout.engine.EmbeddedEngine).
DECODE_BATCH = 128


@dataclass(frozen=True)
class Memory:
    """Bytes by part; ``total`` adds what CUDA and the allocator take."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    vision: float
    rollout: float

    @property
    def total(self) -> float:
        parts = sum(getattr(self, field.name) for field in fields(self))
        return parts * (1 + FRAGMENTATION) + RESERVED_BYTES

    def fits(self, gpu: GPU) -> bool:
        return self.total <= gpu.memory


def layer_bytes(decoder: Decoder, recompute: Recompute, tp: int, sequence_parallel: bool) -> float:
    """What a decoder layer keeps of one token for its backward.

    none: both norms' inputs and outputs 4H; q, k, v before and q, k after norm and rotation, and the attention's output
    (which is also the projection's input) 3Q + 3K; gate, up and their product 3F. selective recomputes what costs no
    matrix product: norms, rotation, SwiGLU's product. full keeps the layer's input.
    """
    hidden, query, kv, ffn = decoder.hidden_size, decoder.query_size, decoder.kv_size, decoder.ffn_hidden_size
    stream = tp if sequence_parallel else 1
    if recompute == "full":
        return 2 * hidden / stream
    if recompute == "selective":
        return 2 * (2 * hidden / stream + (2 * query + 2 * kv + 2 * ffn) / tp)
    return 2 * (4 * hidden / stream + (3 * query + 3 * kv + 3 * ffn) / tp)


def vision_layer_bytes(vision: Vision, recompute: Recompute, tp: int) -> float:
    """The same for a patch in a ViT layer, whose stream is not split over tensor-parallel ranks."""
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    if recompute == "full":
        return 2 * hidden
    inner = (3 if vision.gated else 2) * ffn
    if recompute == "selective":
        return 2 * (2 * hidden + (4 * hidden + inner - ffn) / tp)
    return 2 * (4 * hidden + (4 * hidden + inner) / tp)


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> dict[str, float]:
    """Parameters of a rank of one pipeline stage: layers, embedding, norm, head, vision and projector, as it has them.

    A tied head is the embedding on a stage that holds both, and a copy of it on a last stage that does not.
    """

    def share(count: int, whole: int) -> float:
        return (count - whole) / layout.tp + whole

    decoder, vision, first, last = shape.decoder, shape.vision, stage == 0, stage == layout.pp - 1
    parts = {"layers": decoder.num_layers / layout.pp * share(decoder.layer_parameters, decoder.layer_whole)}
    if first:
        parts["embedding"] = share(decoder.embedding_parameters, 0)
    if last:
        parts["norm"] = float(decoder.hidden_size)
    if last and not (first and decoder.tied):
        parts["head"] = share(decoder.embedding_parameters, 0)
    if first and vision:
        layers = vision.num_layers * share(vision.layer_parameters, vision.layer_whole)
        parts["vision"] = vision.input_parameters + layers
        parts["projector"] = share(vision.projector_parameters, vision.projector_whole)
    return parts


def trained_parameters(shape: ModelShape, layout: Layout, execution: Execution, stage: int) -> float:
    """Of these, the ones that are not frozen."""
    trains = {"vision": execution.train_vision, "projector": execution.train_projector}
    parts = stage_parameters(shape, layout, stage)
    return sum(count for part, count in parts.items() if trains.get(part, execution.train_decoder))


def alive_micro_batches(layout: Layout, micro_batches: int, stage: int) -> tuple[float, int]:
    """Micro-batches whose activations a stage holds at most: of all its layers (on average), and of its first chunk.

    1F1B holds as many as there are stages from this one on. Interleaved (Narayanan et al., 2021, section 2.2), a stage
    has 2 (pp - stage - 1) + (vp - 1) pp + 1 chunks forward before the first one goes backward, in rounds of pp
    micro-batches a chunk.
    """
    if layout.interleave == 1:
        alive = min(micro_batches, layout.pp - stage)
        return float(alive), alive
    total = filled_micro_batches(layout, micro_batches) * layout.interleave
    others = (layout.interleave - 1) * layout.pp
    ahead = 2 * (layout.pp - stage - 1) + others + 1
    # The first chunk goes backward last: a round of all the others before it, each with one more forward.
    rounds, rest = divmod(min(total, ahead + others), layout.pp * layout.interleave)
    return min(total, ahead) / layout.interleave, rounds * layout.pp + min(layout.pp, rest)


def stage_memory(shape: ModelShape, layout: Layout, execution: Execution, work: Work, stage: int) -> Memory:
    decoder, vision = shape.decoder, shape.vision
    parameters = sum(stage_parameters(shape, layout, stage).values())
    trained = trained_parameters(shape, layout, execution, stage)
    shards = layout.dp * layout.cp
    half = execution.dtype == "bfloat16"
    copies = 2 if execution.reference_copy else 1
    if execution.sharding == "fsdp":
        gathered = 2 * (decoder.embedding_parameters + 2 * decoder.layer_parameters) / layout.tp
        weights, gradients = 4 * copies * parameters / shards + gathered, 4 * trained / shards
        states = 8 * trained / shards
    else:
        weights, gradients = execution.width * copies * parameters, 4 * trained
        # float32 master copy (where the weights are half precision) and Adam's two moments.
        states = (12 if half else 8) * trained / (shards if execution.sharding == "zero1" else 1)

    scale = execution.width / 2
    tokens = work.tokens / layout.cp
    layers = decoder.num_layers / layout.pp
    alive, seen = alive_micro_batches(layout, work.micro_batches, stage)
    kept = layer_bytes(decoder, execution.recompute, layout.tp, layout.sequence_parallel)
    working = layer_bytes(decoder, "none", layout.tp, layout.sequence_parallel)
    # The layer under work holds all its activations and about as many gradients of them.
    activations = scale * tokens * (kept * layers * alive + 2 * working)

    head = 0.0
    if stage == layout.pp - 1 and work.loss_rows:
        rows = work.loss_rows / layout.cp
        whole = rows * decoder.vocab_size / layout.tp
        hidden = 3 * 4 * rows * decoder.hidden_size
        chunk = min(HEAD_CHUNK_BYTES, 6 * whole)
        head = hidden + (chunk if execution.fused_head else WHOLE_LOGIT_BYTES * whole)

    sight = 0.0
    if vision is not None and stage == 0 and work.patches:
        depth = vision.num_layers * seen if execution.train_vision else 0
        per_patch = vision_layer_bytes(vision, execution.recompute, layout.tp) * depth
        per_patch += 2 * vision_layer_bytes(vision, "none", layout.tp)
        visual = (vision.projectors * (vision.middle + vision.output_size) * 2 * 2) / vision.merge
        sight = scale * work.patches * (per_patch + 4 * vision.patch_dim + visual)

    rollout = 0.0
    if work.responses:
        entry = 2 * execution.width * layers * decoder.kv_size / layout.tp
        alive_responses = min(DECODE_BATCH, work.responses / layout.cp)
        rollout = entry * (work.prompts / layout.cp * work.prompt_tokens + alive_responses * work.response_tokens)
        rollout += 4 * alive_responses * decoder.vocab_size
        # Rollouts and the update take turns: the larger of the two counts, shown as what rollouts need beyond it.
        rollout = max(0.0, rollout - activations - head - sight)
    return Memory(weights, gradients, states, activations, head, sight, rollout)


def worst_stage(shape: ModelShape, layout: Layout, execution: Execution, work: Work) -> Memory:
    return max(
        (stage_memory(shape, layout, execution, work, stage) for stage in range(layout.pp)), key=lambda m: m.total
    )
