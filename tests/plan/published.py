"""What other trainers published, with their settings, against the cost model; and the table of ``docs/plan.md``.

Settings that a source does not give are assumptions, which ``docs/plan.md`` lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from r4b_core.plan.cost import step_time
from r4b_core.plan.machine import GPU, H100, H200, RESERVED_BYTES
from r4b_core.plan.memory import worst_stage
from r4b_core.plan.shapes import SHAPES, ModelShape
from r4b_core.plan.work import Execution, Layout, Work, causal_pairs

# torchtitan's H100: 96 GB of HBM2e at 2.4 TB/s, limited to 500 of 700 W.
H100_500W = replace(H100, name="H100 500 W", memory=96e9, bandwidth=2.4e12, power=500 / 700)
A800 = GPU("A800", 80 * 2**30, 19.5e12, 312e12, 312e12, 2.039e12, 200e9, 25e9, native_flash2=True)

LLAMA8, LLAMA70 = SHAPES["llama3.1-8b"], SHAPES["llama3.1-70b"]
QWEN7, QWEN_VL7 = SHAPES["qwen2.5-7b"], SHAPES["qwen2.5_vl-7b"]

TITAN = (
    "[torchtitan 2024-12](https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md)"
)
TITAN_H200 = (
    "[torchtitan H200](https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_8b_h200_2025-06_torchtitan.md)"
)
BRIDGE = (
    "[Megatron-Bridge](https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/docs/performance-summary-archive.md)"
)
AUTOMODEL = "[NeMo Automodel](https://github.com/NVIDIA-NeMo/Automodel/blob/main/docs/performance-summary.mdx)"
EASYR1 = "[EasyR1](https://github.com/hiyouga/EasyR1/blob/main/assets/baselines.md)"
LMMS = "[lmms-engine](https://github.com/EvolvingLMMs-Lab/lmms-engine/blob/main/docs/reference/mfu.md)"


@dataclass(frozen=True)
class Row:
    """One published number. ``unit``: tokens/s/GPU, MFU in % as the source counts it, or GiB reserved."""

    source: str
    setting: str
    shape: ModelShape
    layout: Layout
    execution: Execution
    work: Work
    gpu: GPU
    published: float
    unit: Literal["tokens/s/GPU", "MFU %", "GiB"] = "tokens/s/GPU"
    note: str = ""

    def predicted(self) -> float:
        if self.unit == "GiB":
            # What the caching allocator has reserved: everything but CUDA's and NCCL's own.
            return (worst_stage(self.shape, self.layout, self.execution, self.work).total - RESERVED_BYTES) / 2**30
        seconds = step_time(self.shape, self.layout, self.execution, self.work, self.gpu).total
        speed = self.work.step_tokens * self.layout.dp / self.layout.gpus / seconds
        return speed if self.unit == "tokens/s/GPU" else 100 * speed * self.counted_flops() / self.gpu.bf16

    def counted_flops(self) -> float:
        """Per token, as verl's counter and its copies do: both tables, all pairs of a sample, no ViT."""
        decoder = self.shape.decoder
        length = 2 * self.work.pairs / self.work.tokens
        dense = decoder.num_layers * decoder.layer_matrices + 2 * decoder.embedding_parameters
        return 6 * dense + 12 * length * decoder.query_size * decoder.num_layers

    def ratio(self) -> float:
        return self.predicted() / self.published

    def line(self) -> str:
        digits = 1 if self.unit != "tokens/s/GPU" else 0
        numbers = f"{self.published:,.{digits}f} | {self.predicted():,.{digits}f} | {self.ratio():.2f}"
        return f"| {self.source} | {self.setting} | {self.unit} | {numbers} |"


def text(micro_batches: int, sequences: int, length: int) -> Work:
    tokens = sequences * length
    return Work(micro_batches, tokens, causal_pairs(tokens, length), tokens)


def titan(**changes: object) -> Execution:
    """FSDP2, compiled, op-level selective checkpointing (every second product repeated), whole logits, SDPA."""
    base = Execution(
        recompute="selective", recomputed=0.5, sharding="fsdp", overlap_data=True, fused_head=False, attention="flash2"
    )
    return replace(base, **changes)  # type: ignore[arg-type]


TITAN_FULL = titan(fp8=True, recompute="full", recomputed=1.0)
MEGATRON_FP8 = Execution(
    fp8=True, overlap_data=True, overlap_tensor=True, fused_head=False, attention="native", recompute="none"
)
NEMO = Execution(sharding="fsdp", overlap_data=True, fused_head=False, attention="native")
LORA = replace(NEMO, train_decoder=False, fused=False)
VERL = Execution(
    sharding="fsdp",
    overlap_data=True,
    fused=False,
    fused_head=False,
    attention="flash2",
    recompute="full",
    varying=True,
)
LIGER = Execution(sharding="fsdp", overlap_data=True, attention="flash2", recompute="full")

# EasyR1's default config: 512 prompts x 5 rollouts a step, 128 x 5 an update; micro-batches packed up to micro-batch
# size x 4,096 tokens. Tokens per sample follow from its own throughput and seconds per step; images from min_pixels.
GEO3K_SAMPLES = 128 * 5 / 8
GEO3K_PATCHES = 512 * 512 / 14**2


def geo3k(micro_batches: int, tokens_per_second: float, seconds: float) -> Work:
    length = tokens_per_second * 8 * seconds / (512 * 5)
    samples = GEO3K_SAMPLES / micro_batches
    assert QWEN_VL7.vision is not None
    return Work(
        micro_batches,
        samples * length,
        causal_pairs(samples * length, length),
        samples * length,
        patches=samples * GEO3K_PATCHES,
        vision_pairs=samples * QWEN_VL7.vision.attention_pairs(int(GEO3K_PATCHES)),
        samples=GEO3K_SAMPLES,
    )


def packed(tokens: int, length: int, image_share: float) -> Work:
    """One pack of samples, a share of whose tokens are of one image each."""
    assert QWEN_VL7.vision is not None
    patches = int(length * image_share * QWEN_VL7.vision.merge)
    samples = tokens / length
    pairs = samples * QWEN_VL7.vision.attention_pairs(patches) if patches else 0.0
    return Work(1, tokens, causal_pairs(tokens, length), tokens, patches=samples * patches, vision_pairs=pairs)


CP_TOKENS = {1: 3890, 2: 2540, 4: 1071, 8: 548}
CP_MEMORY = {1: 83.9, 2: 84.2, 4: 84.0, 8: 84.5}


def _context(cp: int, unit: Literal["tokens/s/GPU", "GiB"]) -> Row:
    published = CP_TOKENS[cp] if unit == "tokens/s/GPU" else CP_MEMORY[cp]
    setting = f"Llama-3.1-8B, 8 H100, FSDP {8 // cp}, CP {cp}, {32 * cp}k, FP8, full recompute"
    layout = Layout(dp=8 // cp, cp=cp)
    return Row(TITAN, setting, LLAMA8, layout, TITAN_FULL, text(1, 1, 32768 * cp), H100_500W, published, unit)


def _titan(gpus: int, setting: str, published: float, **changes: object) -> Row:
    setting = f"Llama-3.1-8B, {gpus} H100, FSDP, 2 x 8k, {setting}"
    return Row(TITAN, setting, LLAMA8, Layout(dp=gpus), titan(**changes), text(1, 2, 8192), H100_500W, published)


def _easyr1(micro: str, micro_batches: int, speed: float, seconds: float, mfu: float) -> Row:
    setting = f"Qwen2.5-VL-7B GRPO update, geo3k, 8 H100, FSDP, micro-batch {micro}"
    work = geo3k(micro_batches, speed, seconds)
    return Row(EASYR1, setting, QWEN_VL7, Layout(dp=8), VERL, work, H100, mfu, "MFU %")


_PP8 = Layout(tp=4, pp=8, dp=2, interleave=5, sequence_parallel=True)
_PP4 = Layout(tp=4, pp=4, dp=2, interleave=5, sequence_parallel=True)
_BLOCK = replace(MEGATRON_FP8, sharding="fsdp", recompute="full", recomputed=5 / 32)
_TITAN8 = titan(fp8=True)

WITHIN = [
    _titan(8, "eager", 5762, fused=False),
    _titan(8, "compiled", 6667),
    _titan(8, "compiled, FP8", 8532, fp8=True),
    _titan(128, "eager", 5605, fused=False),
    _titan(128, "compiled", 6514),
    _context(1, "tokens/s/GPU"),
    _context(2, "tokens/s/GPU"),
    _context(1, "GiB"),
    _context(8, "GiB"),
    Row(
        TITAN_H200,
        "Llama-3.1-8B, 32 H200, FSDP, 2 x 8k, compiled, FP8",
        LLAMA8,
        Layout(dp=32),
        _TITAN8,
        text(1, 2, 8192),
        H200,
        10938,
    ),
    Row(
        BRIDGE,
        "Llama-3-8B, 8 H100, FSDP, 8k, FP8, 5 of 32 layers recomputed (25.11)",
        LLAMA8,
        Layout(dp=8),
        _BLOCK,
        text(16, 1, 8192),
        H100,
        14451,
    ),
    Row(
        BRIDGE,
        "Llama-3-70B, 64 H100, TP 4, PP 8, VP 5, batch 128, 8k, FP8 (25.11)",
        LLAMA70,
        _PP8,
        MEGATRON_FP8,
        text(64, 1, 8192),
        H100,
        1602,
    ),
    Row(
        BRIDGE,
        "Llama-3-70B SFT, 32 H100, TP 4, PP 4, VP 5, batch 32, 4k, FP8 (26.06)",
        LLAMA70,
        _PP4,
        MEGATRON_FP8,
        text(16, 1, 4096),
        H100,
        1638,
    ),
    Row(
        AUTOMODEL,
        "Llama-3-70B, 64 H100, FSDP 32, CP 2, batch 128, 8k, BF16, full recompute",
        LLAMA70,
        Layout(dp=32, cp=2),
        replace(NEMO, recompute="full"),
        text(4, 1, 8192),
        H100,
        866.77,
    ),
    Row(
        AUTOMODEL,
        "Llama-3-8B LoRA, 1 H100, 2 x 4k, BF16",
        LLAMA8,
        Layout(),
        LORA,
        text(16, 2, 4096),
        H100,
        12472.87,
    ),
    Row(AUTOMODEL, "Qwen2.5-7B LoRA, 1 H100, 2 x 4k, BF16", QWEN7, Layout(), LORA, text(16, 2, 4096), H100, 14110.05),
    _easyr1("4 / 8", 4, 2000, 120, 23.2),
    Row(
        LMMS,
        "Qwen2.5-VL-7B images, 32 A800, FSDP, packs of 61,440 (30 to 40 %)",
        QWEN_VL7,
        Layout(dp=32),
        LIGER,
        packed(61440, 2048, 0.5),
        A800,
        35.0,
        "MFU %",
    ),
    Row(
        LMMS,
        "Qwen2.5-7B text, 32 A800, FSDP, packs of 81,920 (50 to 55 %)",
        QWEN7,
        Layout(dp=32),
        LIGER,
        packed(81920, 2048, 0.0),
        A800,
        52.5,
        "MFU %",
    ),
]

MISSED = [
    replace(_easyr1("1 / 2", 15, 1600, 145, 16.0), note="A fixed cost of about half a second per micro-batch."),
    replace(_context(4, "tokens/s/GPU"), note="Ring attention loses more than its bytes say."),
    replace(_context(8, "tokens/s/GPU"), note="The same."),
    replace(
        _titan(8, "compiled", 77.0),
        unit="GiB",
        note="Keeping half the products' outputs is not a mode of ours; predicted with selective.",
    ),
]

HEADER = "| source | setting | unit | published | predicted | ratio |\n|---|---|---|---|---|---|"


def table(rows: list[Row]) -> str:
    return "\n".join([HEADER, *(row.line() for row in rows)])
