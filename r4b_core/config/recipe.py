"""The recipe: one typed YAML for data, pre-training, annealing, distillation, BPO and evaluation.

An unknown key is an error, and so are settings that contradict each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Settings(BaseModel):
    """Base of every section: frozen, typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Settings):
    """Which model. ``shape`` overrides single fields of the named size (checked by the family)."""

    family: Literal["r4b", "qwen3_vl"] = "r4b"
    size: str = "toy"
    shape: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    processor: str | None = Field(
        None, description="folder with tokenizer.json and preprocessor_config.json; none: the words of the board task"
    )
    init_from: str | None = Field(
        None, description="a run folder, a checkpoint, or a folder of `r4b convert` whose weights the run starts from"
    )


class DataConfig(Settings):
    """What is trained on: the board task (coloured tiles with real handwritten digits), or files of records."""

    task: Literal["boards", "records"] = "boards"
    train: list[str] = Field(default_factory=list, description="records: Parquet or JSONL files, or globs of them")
    held_out_files: list[str] = Field(default_factory=list, description="records: files for probes and evaluation")
    min_pixels: int | None = Field(None, ge=1, description="records: smallest area of an image; none: the processor's")
    max_pixels: int | None = Field(None, ge=1, description="records: largest area of an image; none: the processor's")
    lookahead: int = Field(16, ge=1, description="records: how many are at hand to fill a packed sequence from")
    prefetch: int = Field(2, ge=0, description="records: steps that are prepared ahead while one is trained on")
    threads: int = Field(2, ge=1, description="records: threads that decode the images of a step")
    decoder: Literal["pillow", "dali"] = Field(
        "pillow", description="records: what decodes; dali on the GPU where one is"
    )
    max_bad_share: float = Field(
        0.2, ge=0, le=1, description="records: the run ends if more of the first 1,000 cannot be used"
    )
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the handwritten digits kept for evaluation")
    max_operations: int = Field(8, ge=1, le=11)
    augment: bool = Field(True, description="small shifts, turns and scales of training digits")


class ParallelConfig(Settings):
    """Megatron-Core layout; data parallelism is what the world size leaves over."""

    tp: int = Field(1, ge=1, description="tensor parallel size")
    pp: int = Field(1, ge=1, description="pipeline parallel size")
    cp: int = Field(1, ge=1, description="context parallel size (all-to-all over heads)")
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    virtual_stages: int = Field(1, ge=1, description="model chunks per pipeline rank (interleaved 1F1B)")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations that the backward pass computes again"
    )
    timeout_s: int = Field(60, ge=5, description="a collective that takes longer is an error")

    @model_validator(mode="after")
    def _sequence_parallel_needs_tp(self) -> ParallelConfig:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel=true shards over tensor-parallel ranks, tp is 1: set tp >= 2 or turn it off"
            )
        return self

    @model_validator(mode="after")
    def _interleaving_needs_stages(self) -> ParallelConfig:
        if self.virtual_stages > 1 and self.pp == 1:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} interleaves pipeline stages, pp is 1: set pp >= 2 or take 1"
            )
        return self


class OptimConfig(Settings):
    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of lr")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_scale: dict[str, float] = Field(
        default_factory=dict,
        description="factor by parameter-name prefix (layers counted over all stages), the longest counts; 0 freezes",
    )
    constant: list[str] = Field(
        default_factory=list, description="parameter-name prefixes whose rate only warms up, whatever the schedule"
    )

    @field_validator("lr_scale")
    @classmethod
    def _scales_are_finite(cls, scales: dict[str, float]) -> dict[str, float]:
        for prefix, scale in scales.items():
            if not 0 <= scale < math.inf:
                raise ValueError(f"{prefix!r}: {scale} is no factor of a learning rate; give 0 (frozen) or more")
        return scales


_PER_STEP = "samples per step; of records: packed sequences per step"
_MASK = "records: no loss on the empty think block's own tokens in direct responses (R-4B appendix B.3)"


class PretrainConfig(Settings):
    """R-4B's pre-training stages, parts frozen by ``optim.lr_scale``: SFT on records.

    On boards a stand-in: each visual token says what it shows.
    """

    steps: int = Field(400, ge=0)
    batch_size: int = Field(64, ge=1, description="boards: images per step; records: packed sequences per step")
    mask_empty_think: bool = Field(True, description=_MASK)
    optim: OptimConfig = OptimConfig(lr=3e-3, warmup_steps=50, schedule="cosine")


class AnnealConfig(Settings):
    """Bi-mode annealing: SFT on thinking and direct samples together, no complexity label (R-4B section 2)."""

    steps: int = Field(600, ge=0)
    batch_size: int = Field(64, ge=1, description=_PER_STEP)
    mask_empty_think: bool = Field(False, description=_MASK)
    mix: dict[str, float] = Field(
        default_factory=lambda: {"read": 0.2, "count": 0.2, "value": 0.6},
        description="boards: share of each question family",
    )
    annotator: Literal["stand_in", "model"] = Field(
        "stand_in",
        description="boards: who makes the k tries that decide thinking or direct, a stand-in or the model itself; "
        "records bring their modes",
    )
    tries: int = Field(8, ge=1, description="boards: k; none right -> thinking, else direct")
    tail: Literal["none", "direct", "thinking"] = Field("none", description="boards: extra steps on one mode only")
    tail_steps: int = Field(60, ge=0)
    tail_lr: float = Field(2e-4, gt=0)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup_steps=50, lr_scale={"vision": 0.1})


class DistillConfig(Settings):
    """SFT on curated records (MMFineReason section 5.1), with a teacher's distribution where there is one.

    The loss of a response token is (1 - logit_weight) times its negative log-likelihood plus logit_weight times
    temperature squared times the divergence from the teacher's most probable tokens.
    """

    steps: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1, description="packed sequences per step")
    mask_empty_think: bool = Field(False, description=_MASK)
    logit_weight: float = Field(0.0, ge=0, le=1, description="share of the divergence in the loss; 0 is SFT alone")
    teacher: str | None = Field(
        None,
        description="a run folder or checkpoint of the same family that is evaluated on the fly; none: the files bring "
        "the teacher's log-probabilities in teacher_ids and teacher_logprobs",
    )
    teacher_top_k: int = Field(64, ge=1, description="tokens per position that are asked of the teacher")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = Field(0.5, ge=0, le=1, description="the teacher's share of jsd's mixture")
    temperature: float = Field(1.0, gt=0)
    optim: OptimConfig = OptimConfig(lr=1e-5, min_lr_ratio=0.0, weight_decay=0.0, schedule="cosine")


PRESETS: dict[str, dict[str, Any]] = {
    "bpo": dict(rollouts="both", importance="token", std=True, reduction="token_mean", clip_low=0.2, clip_high=0.2),
    "grpo": dict(rollouts="free", importance="token", std=True, reduction="sequence_mean", clip_low=0.2, clip_high=0.2),
    "gspo": dict(
        rollouts="free", importance="sequence", std=True, reduction="sequence_mean", clip_low=3e-4, clip_high=4e-4
    ),
    "dr_grpo": dict(rollouts="free", importance="token", std=False, reduction="constant", clip_low=0.2, clip_high=0.2),
    "dapo": dict(
        rollouts="free",
        importance="token",
        std=True,
        reduction="token_mean",
        clip_low=0.2,
        clip_high=0.28,
        drop_zero_variance=True,
    ),
}


class BpoConfig(Settings):
    """Reinforcement learning (R-4B section 3, Eq. 1). ``algorithm`` fills the fields left unset, any may be set."""

    steps: int = Field(100, ge=0)
    prompts: int = Field(16, ge=1, description="prompts per step, over all data-parallel ranks")
    group_size: int = Field(4, ge=1, description="g: rollouts per prompt and mode (2g in all)")
    mix: dict[str, float] = Field(
        default_factory=lambda: {"read": 0.2, "count": 0.2, "value": 0.6},
        description="boards: share of each question family",
    )
    bands: dict[str, float] = Field(
        default_factory=dict,
        description='records: share of prompts by pass rate, such as {"[0,0.25)": 0.5, "[0.25,1)": 0.5, unknown: 0.1}; '
        "empty: all alike",
    )
    rate_update: float = Field(
        0.5, ge=0, le=1, description="records: weight of a group's share of right answers in its prompt's pass rate"
    )
    algorithm: Literal["bpo", "grpo", "gspo", "dr_grpo", "dapo"] = "bpo"
    rollouts: Literal["both", "free"] = Field("both", description="g forced into each mode, or 2g that choose freely")
    advantage: Literal["union", "per_mode", "leave_one_out"] = "union"
    std: bool = Field(True, description="divide the advantage by the group's standard deviation")
    importance: Literal["token", "sequence"] = "token"
    reduction: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    kl_coef: float = Field(0.1, ge=0, description="weight of the k3 KL estimate to the annealed model")
    drop_zero_variance: bool = Field(False, description="leave out groups whose rewards are all equal (DAPO)")
    mode_token_loss: Literal["include", "exclude"] = Field("include", description="do forced mode tokens carry loss")
    mode_token_weight: float = Field(1.0, ge=0, description="weight of the decision token's loss")
    length_cost: float = Field(0.0, ge=0, description="reward minus this times tokens/budget; the paper has none")
    old_logprob: Literal["rollout", "recompute"] = Field("rollout", description="whose log-probs the ratio divides by")
    epochs: int = Field(1, ge=1, description="updates per batch of rollouts")
    share_prefix: bool = Field(True, description="pack each prompt once with all its responses")
    max_new_tokens: int = Field(40, ge=4)
    temperature: float = Field(1.0, gt=0)
    freeze: list[str] = Field(default_factory=lambda: ["vision"], description="parameter-name prefixes that stay fixed")
    probe_every: int = Field(5, ge=0, description="steps between free probes of the thinking rate; 0 = never")
    probe_prompts: int = Field(64, ge=1)
    thinking_band: tuple[float, float] = Field((0.02, 0.98), description="alarm when the free thinking rate leaves it")
    optim: OptimConfig = OptimConfig(lr=2e-4, weight_decay=0.01)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**PRESETS.get(values.get("algorithm", "bpo"), {}), **values}
        return values

    @field_validator("bands")
    @classmethod
    def _bands_are_intervals(cls, bands: dict[str, float]) -> dict[str, float]:
        for name, share in bands.items():
            if name != UNKNOWN_BAND:
                Band.parse(name)
            if share < 0:
                raise ValueError(f"{name} has the share {share}: shares are not negative")
        if bands and not sum(bands.values()):
            raise ValueError("all shares are 0: give at least one band more, or no bands at all")
        return bands


UNKNOWN_BAND = "unknown"
_INTERVAL = re.compile(r"([\[(])\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*([\])])")


@dataclass(frozen=True)
class Band:
    """An interval of pass rates: ``[0,0.25)`` holds 0 and does not hold 0.25."""

    low: float
    high: float
    holds_low: bool
    holds_high: bool

    @staticmethod
    def parse(text: str) -> Band:
        """
        Raises:
            ValueError: it is no interval within 0 and 1, or an empty one.
        """
        match = _INTERVAL.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is no band: write an interval of pass rates such as '[0,0.25)', where [ ] take an end "
                "in and ( ) leave it out"
            )
        band = Band(float(match[2]), float(match[3]), match[1] == "[", match[4] == "]")
        is_one = band.low == band.high and band.holds_low and band.holds_high
        if band.high > 1 or not (band.low < band.high or is_one):
            raise ValueError(f"{text!r} holds no pass rate: two numbers within 0 and 1, the smaller one first")
        return band

    def holds(self, rate: Any) -> Any:
        """Whether a rate, or each of an array of rates, lies in it."""
        above = rate >= self.low if self.holds_low else rate > self.low
        return above & (rate <= self.high if self.holds_high else rate < self.high)


class PackingConfig(Settings):
    capacity: int = Field(4096, ge=64, description="tokens of one micro-batch on one data-parallel rank")
    static: bool = Field(False, description="pad every micro-batch to the capacity (static shapes for GPUs)")


class EvaluateConfig(Settings):
    items: int = Field(
        256,
        ge=2,
        description="boards: held-out items per family and mode, two at least, to exchange their images; records: "
        "held-out records in all",
    )
    batch: int = Field(128, ge=1, description="requests decoded together")
    max_new_tokens: int | None = Field(None, ge=4, description="budget of an answer; none: that of bpo")


class CheckpointConfig(Settings):
    every: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1)


class TelemetryConfig(Settings):
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    rollouts_every: int = Field(10, ge=1, description="steps between rollout files (Parquet)")


class Recipe(Settings):
    """Everything a run needs. Stages with ``steps: 0`` are skipped."""

    name: str
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    packing: PackingConfig = PackingConfig()
    pretrain: PretrainConfig = PretrainConfig()
    anneal: AnnealConfig = AnnealConfig()
    distill: DistillConfig = DistillConfig()
    bpo: BpoConfig = BpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Recipe:
        problems = [*(self._of_boards() if self.data.task == "boards" else self._of_records())]
        if self.distill.logit_weight == 0 and self.distill.teacher is not None:
            problems.append("distill.teacher has no say where distill.logit_weight = 0: raise it, or leave teacher out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_boards(self) -> Iterator[str]:
        if self.model.family != "r4b" or self.model.processor is not None:
            setting = f"model.family = {self.model.family}" if self.model.family != "r4b" else "model.processor"
            yield (
                f"{setting} does not go with data.task = boards, whose words and tiles are r4b's own: set data.task = "
                "records and data.train"
            )
        if self.distill.steps:
            yield "distill.steps: boards have no teacher; set data.task = records and data.train, or distill.steps = 0"
        for name in ("train", "held_out_files"):
            if getattr(self.data, name):
                yield f"data.{name} names files, but data.task = boards reads none: set data.task = records"
        if self.bpo.bands:
            yield "bpo.bands are of records: boards are drawn by bpo.mix"

    def _of_records(self) -> Iterator[str]:
        data = self.data
        stages = [name for name in ("pretrain", "anneal", "distill", "bpo") if getattr(self, name).steps]
        if stages and not data.train:
            yield f"data.train is empty and {', '.join(stages)} train on records: name their Parquet or JSONL files"
        if self.model.processor is None:
            yield (
                "model.processor is not set, and records need a tokenizer: give the folder of a checkpoint with "
                "tokenizer.json and preprocessor_config.json"
            )
        if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
            yield f"data.min_pixels = {data.min_pixels} is above data.max_pixels = {data.max_pixels}"
        if self.anneal.annotator != "stand_in" or self.anneal.tail != "none":
            yield (
                "anneal.annotator and anneal.tail are of boards: records bring their modes; choose them with "
                "`r4b curate select`"
            )
        if self.bpo.steps and self.bpo.probe_every and not data.held_out_files:
            yield (
                "data.held_out_files is empty and bpo.probe_every asks for probes: name files that are not trained on, "
                "or set bpo.probe_every = 0"
            )
