"""The recipe: one typed YAML for data, pre-training, annealing, BPO and evaluation. An unknown key is an error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class OptimConfig(Settings):
    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of lr")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_scale: dict[str, float] = Field(default_factory=dict, description="factor by parameter-name prefix; 0 freezes")


class PretrainConfig(Settings):
    """Vision-language alignment, a stand-in for R-4B's pre-training stages: each visual token says what it shows."""

    steps: int = Field(400, ge=0)
    batch_size: int = Field(64, ge=1, description="images per step")
    optim: OptimConfig = OptimConfig(lr=3e-3, warmup_steps=50, schedule="cosine")


class AnnealConfig(Settings):
    """Bi-mode annealing: SFT on thinking and direct samples together, no complexity label (R-4B section 2)."""

    steps: int = Field(600, ge=0)
    batch_size: int = Field(64, ge=1, description="samples per step")
    mix: dict[str, float] = Field(
        default_factory=lambda: {"read": 0.2, "count": 0.2, "value": 0.6}, description="share of each question family"
    )
    annotator: Literal["stand_in", "model"] = Field(
        "stand_in", description="who makes the k tries that decide thinking or direct: a stand-in or the model itself"
    )
    tries: int = Field(8, ge=1, description="k; none right -> thinking, else direct")
    tail: Literal["none", "direct", "thinking"] = Field("none", description="extra steps on one mode only")
    tail_steps: int = Field(60, ge=0)
    tail_lr: float = Field(2e-4, gt=0)
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup_steps=50, lr_scale={"vision": 0.1})


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
        default_factory=lambda: {"read": 0.2, "count": 0.2, "value": 0.6}, description="share of each question family"
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


class PackingConfig(Settings):
    capacity: int = Field(4096, ge=64, description="tokens of one micro-batch on one data-parallel rank")
    static: bool = Field(False, description="pad every micro-batch to the capacity (static shapes for GPUs)")


class EvaluateConfig(Settings):
    items: int = Field(256, ge=2, description="held-out items per family and mode; two, to exchange their images")
    batch: int = Field(128, ge=1, description="requests decoded together")


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
    bpo: BpoConfig = BpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
