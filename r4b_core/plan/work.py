"""What a step consists of: layouts, how the trainer runs, tokens and FLOPs per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from r4b_core.plan.machine import Precision
from r4b_core.plan.shapes import ModelShape

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """GPUs = tp * pp * cp * dp, in this order from the closest to the farthest, pp last (Megatron-Core's order)."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    interleave: int = 1
    sequence_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        text = f"tp {self.tp} pp {self.pp} cp {self.cp} dp {self.dp}"
        text += f" vp {self.interleave}" if self.interleave > 1 else ""
        return text + (" sp" if self.sequence_parallel else "")


@dataclass(frozen=True)
class Execution:
    """How a trainer runs the model. The defaults are r4b's.

    Attributes:
        fp8: the decoder's linear layers multiply in FP8 (r4b does not; some published rows do).
        recomputed: share of a layer's matrix products that the backward repeats; None: what ``recompute`` says.
        sharding: what data-parallel ranks split: nothing, the optimizer ("zero1", the distributed optimizer) or
            everything ("fsdp").
        regather: FSDP gathers the weights for every micro-batch's forward and backward; else once a step.
        overlap_data, overlap_tensor: whether gradient/weight and tensor-parallel collectives run beside computation.
        reference_copy: a frozen second set of weights (the KL term's) stays on the GPU.
        fused: norms, rope and SwiGLU are single kernels (written or compiled).
        fused_head: the loss is taken from the hidden states in chunks and the logits recomputed; else all exist.
        attention: a kernel written for the GPU, or FlashAttention 2 / Triton.
        varying: ranks get samples of various lengths that nothing packs to one.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: bool = False
    recompute: Recompute = "none"
    recomputed: float | None = None
    sharding: Literal["none", "zero1", "fsdp"] = "zero1"
    regather: bool = True
    overlap_data: bool = False
    overlap_tensor: bool = False
    fused: bool = True
    fused_head: bool = True
    attention: Literal["native", "flash2", "triton"] = "triton"
    train_decoder: bool = True
    train_vision: bool = True
    train_projector: bool = True
    varying: bool = False
    reference_copy: bool = False

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def precision(self) -> Precision:
        """Of products that are not the decoder's linear layers."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"

    @property
    def repeated(self) -> float:
        if self.recomputed is not None:
            return self.recomputed
        return 1.0 if self.recompute == "full" else 0.0


@dataclass(frozen=True)
class Work:
    """One update of one data-parallel rank (its tp x cp x pp GPUs together).

    Attributes:
        micro_batches: how many.
        tokens: of one micro-batch, image tokens included.
        pairs: (query, key) pairs that attend in one layer, of one micro-batch.
        loss_rows: rows of one micro-batch that reach the head.
        patches: of one micro-batch.
        vision_pairs: over all ViT layers, of one micro-batch.
        samples: per update, for how evenly lengths average out.
        prompts, prompt_tokens, responses, response_tokens: of the rollouts before the update; 0 where there are none.
        scored: forward passes over the same tokens beside the update (reference or old log-probs).
        updates: per step (epochs).
    """

    micro_batches: int
    tokens: float
    pairs: float
    loss_rows: float
    patches: float = 0.0
    vision_pairs: float = 0.0
    samples: float = 1.0
    prompts: float = 0.0
    prompt_tokens: float = 0.0
    responses: float = 0.0
    response_tokens: float = 0.0
    scored: int = 0
    updates: int = 1

    @property
    def step_tokens(self) -> float:
        return self.micro_batches * self.tokens


def filled_micro_batches(layout: Layout, count: int) -> int:
    """Micro-batches that a pipeline runs: interleaving goes in rounds of pp, and fills the last one up."""
    return -(-count // layout.pp) * layout.pp if layout.interleave > 1 else count


def causal_pairs(tokens: float, length: float) -> float:
    """Pairs of ``tokens`` packed from sequences of ``length``."""
    return tokens * (length + 1) / 2


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one micro-batch by part; a multiply-add counts as two."""

    linear: float
    attention: float
    head: float
    vision: float
    vision_attention: float
    projector: float


def forward_flops(shape: ModelShape, work: Work) -> Flops:
    decoder, vision = shape.decoder, shape.vision
    linear = 2 * work.tokens * decoder.num_layers * decoder.layer_matrices
    attention = 4 * work.pairs * decoder.num_layers * decoder.query_size
    head = 2 * work.loss_rows * decoder.embedding_parameters
    if vision is None or not work.patches:
        return Flops(linear, attention, head, 0.0, 0.0, 0.0)
    eyes = 2 * work.patches * (vision.patch_dim * vision.hidden_size + vision.num_layers * vision.layer_matrices)
    projector = 2 * work.patches / vision.merge * vision.projectors * vision.projector_matrices
    return Flops(linear, attention, head, eyes, 4 * work.vision_pairs * vision.hidden_size, projector)


def step_flops(shape: ModelShape, work: Work) -> float:
    """Model FLOPs of one update: three times the forward, nothing for recomputation."""
    forward = forward_flops(shape, work)
    parts = (forward.linear, forward.attention, forward.head, forward.vision, forward.vision_attention)
    return 3 * work.micro_batches * (sum(parts) + forward.projector)
