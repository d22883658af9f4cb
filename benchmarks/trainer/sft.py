"""One SFT update of ours on packed batches against the same update by TRL's SFTTrainer: useful tokens per second.

    OMP_NUM_THREADS=1 r4b bench trainer sft

Both sides hold the same weights and get the same tokenised samples; before the clock starts their losses must agree to
1e-4. The lengths are those of MMFineReason's reasoning (mean 2,910, sd 2,464, 239 to 16,316 tokens), drawn from a
log-normal and divided by 16. A useful token is one that carries loss: a response's. Everything is in float32, with
AdamW and gradients clipped at 1.

An update of ours is packing and `Learner.step`. TRL's is its collator, its ``training_step`` for each micro-batch,
clipping and its optimizer's step; its data loader, callbacks and logging are left out. Its rows:

- defaults: 8 samples in a micro-batch, padded to the longest, layers recomputed in the backward pass;
- padded: the same without recomputation;
- by length: that with all samples sorted by length, more than ``group_by_length`` can do over a random order;
- packing: ``packing=True``, its best-fit bins of 1,024 tokens, one in a micro-batch (the fastest size), attention with
  the mask of each bin (SDPA; a CPU has nothing else). With images TRL refuses to pack.

Ours is Qwen3-VL. ``text`` gives TRL the same decoder as Qwen3 alone, ``images`` the whole model; there the collator is
ours, since TRL's would process every image again in each update.

The floor is the update's FLOPs (causal half, no padding, head on response tokens) over the rate of a square matrix
product, measured in the same run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl import __version__ as trl_version

from benchmarks.turns import in_turns
from r4b_core.config.recipe import ModelConfig, OptimConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import Response, pack_sft
from r4b_core.losses.heads import sft_head
from r4b_core.models.qwen3_vl.config import Qwen3VLConfig, resolve
from r4b_core.models.qwen3_vl.model import Qwen3VLModel, build_model
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt
from r4b_core.models.r4b.flops import attention_pairs
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import Runtime
from tests.models.qwen3_vl_oracle import IMAGE_TOKEN, make_oracle, random_prompt, their_patches, to_megatron

Item = tuple[Qwen3VLPrompt, Response]

SHAPE: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=2048,
    vision_num_layers=2,
    vision_hidden_size=128,
    vision_ffn_hidden_size=512,
    vision_num_heads=4,
)
SAMPLES, CAPACITY, TURNS = 32, 1024, 3
SHRINK = 16
LEARNING_RATE = 1e-9  # the weights stay where they are, whatever the number of updates


def lengths(count: int) -> list[int]:
    """Tokens of responses."""
    mean, deviation, low, high = 2910, 2464, 239, 16_316
    variance = math.log(1 + (deviation / mean) ** 2)
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = (drawn * math.sqrt(variance) + math.log(mean) - variance / 2).exp().clamp(low, high) / SHRINK
    return tokens.round().int().clamp(max=CAPACITY - 128).tolist()


def make_items(shape: Qwen3VLConfig, images: bool) -> list[Item]:
    """Questions of 8 to 23 tokens, with images an image of 20 to 48 tokens (80 to 192 patches) before each."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    items = []
    for length in lengths(SAMPLES):
        grids = [(2 * draw(5, 8), 2 * draw(4, 7))] if images else []
        prompt = random_prompt(generator, shape, 4, grids, draw(4, 20))
        items.append((prompt, Response(torch.randint(0, 62, (length,), generator=generator).tolist())))
    return items


def update_flops(model: Qwen3VLModel, batches: Sequence[PackedBatch]) -> float:
    """Of forward and backward; a multiply-add counts as two."""

    def matrices(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)

    shape, tower = model.shape, model.vision
    mergers = matrices(tower.merger) + matrices(tower.deepstack)
    total = 0.0
    for batch in batches:
        total += 2 * int(batch.layout.offsets[-1]) * matrices(model.decoder)
        total += 4 * attention_pairs(batch.layout) * shape.num_layers * shape.num_heads * shape.head_dim
        total += 2 * batch.num_rows * shape.hidden_size * shape.vocab_size
        total += 2 * len(batch.patches) * (matrices(tower.blocks) + matrices(tower.patch_embed))
        total += 2 * len(batch.patches) / shape.merge_size**2 * mergers
        pairs = int((batch.image_grid.prod(1) ** 2).sum())
        total += 4 * pairs * shape.vision_num_layers * shape.vision_hidden_size
    return 3 * total


def matmul_rate() -> float:
    """FLOP/s of a square product, the best of 20, by the clock that `in_turns` takes on one thread."""
    side, best = 1024, math.inf
    a = torch.randn(side, side)
    for _ in range(20):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * side**3 / best


def qwen3_of(oracle: PreTrainedModel, shape: Qwen3VLConfig) -> Qwen3ForCausalLM:
    """The decoder of Qwen3-VL as a language model of its own, the same to text."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=shape.norm_eps,
            rope_parameters=dict(rope_type="default", rope_theta=shape.rope_theta),
            tie_word_embeddings=shape.tie_embeddings,
        )
    )
    found = model.model.load_state_dict(oracle.model.language_model.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    return model


@dataclass(frozen=True)
class ImageCollator:
    """Padded batches with their images, from the numbers of samples."""

    items: Sequence[Item]
    shape: Qwen3VLConfig

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.items[row["number"]][0] for row in rows]

        def pad(values: list[list[int]], filler: int) -> Tensor:
            longest = max(map(len, values))
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        tokens = pad([row["input_ids"] for row in rows], 0)
        return {
            "input_ids": tokens,
            "labels": pad([row["labels"] for row in rows], -100),
            "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
            "pixel_values": their_patches(torch.cat([prompt.patches for prompt in prompts]), self.shape),
            "image_grid_thw": torch.cat([prompt.image_grid for prompt in prompts]),
        }


def trl_update(
    model: PreTrainedModel,
    items: Sequence[Item],
    folder: Path,
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] | None = None,
    **options: Any,
) -> Callable[[], float]:
    """A call that does one update and returns its loss."""
    rows = [
        {
            "number": number,
            "input_ids": prompt.tokens.tolist() + list(response.tokens),
            "labels": [-100] * prompt.num_tokens + list(response.tokens),
        }
        for number, (prompt, response) in enumerate(items)
    ]
    vocabulary = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1}, "[PAD]"))
    args = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        learning_rate=LEARNING_RATE,
        max_length=CAPACITY,
        report_to="none",
        **options,
    )
    trainer = SFTTrainer(
        copy.deepcopy(model),
        args,
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="[PAD]", eos_token="[EOS]", model_max_length=CAPACITY
        ),
    )
    trainer.create_optimizer_and_scheduler(1000)
    if args.gradient_checkpointing:  # as Trainer.train does when it begins
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    prepared = list(trainer.train_dataset)
    assert sum(len(row["input_ids"]) for row in prepared) == sum(len(row["input_ids"]) for row in rows)
    size = args.per_device_train_batch_size
    micro_batches = [prepared[start : start + size] for start in range(0, len(prepared), size)]
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    # Of Qwen3-VL it would average the means of micro-batches; the mean over tokens is the same work.
    trainer.model_accepts_loss_kwargs = True
    parameters = list(trainer.model.parameters())

    def update() -> float:
        batches = [trainer.data_collator(rows) for rows in micro_batches]
        counted = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        loss = sum(float(trainer.training_step(trainer.model, batch, counted)) for batch in batches)
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss

    return update


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_sft_update(images: bool, benchmark: Any, runtime: Runtime, tmp_path: Path) -> None:
    disable_progress_bar()
    config = ModelConfig(family="qwen3_vl", shape=SHAPE)
    shape = resolve(config)
    oracle, items = make_oracle(shape), make_items(shape, images)
    model = build_model(config, ParallelConfig(), 0)
    weights = to_megatron(dict(oracle.named_parameters()), shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    learner = Learner([model], runtime, OptimConfig(lr=LEARNING_RATE), total_steps=1000)

    def ours() -> float:
        return learner.step(pack_sft(items, CAPACITY), sft_head).loss

    oracle.set_attn_implementation("sdpa")
    theirs = oracle if images else qwen3_of(oracle, shape)

    def trl(items: Sequence[Item], **options: Any) -> Callable[[], float]:
        return trl_update(theirs, items, tmp_path, ImageCollator(items, shape) if images else None, **options)

    by_length = sorted(items, key=lambda item: item[0].num_tokens + len(item[1].tokens))
    rivals = {
        "TRL defaults": trl(items),
        "TRL padded": trl(items, gradient_checkpointing=False),
        "TRL by length": trl(by_length, gradient_checkpointing=False),
    }
    if not images:
        once = dict(packing=True, per_device_train_batch_size=1)
        rivals["TRL packing"] = trl(items, gradient_checkpointing=False, **once)
    loss = ours()
    for name, rival in rivals.items():
        assert rival() == pytest.approx(loss, rel=1e-4), name

    times = in_turns({"ours": ours, **rivals}, TURNS)
    benchmark.pedantic(ours, rounds=1)
    seconds, batches = times.seconds, pack_sft(items, CAPACITY)
    useful = sum(len(response.tokens) for _, response in items)
    stream = sum(int(batch.layout.offsets[-1]) for batch in batches)
    rate = {name: useful / value for name, value in seconds.items()}
    gain = {name: seconds[name] / seconds["ours"] for name in rivals}
    flops, peak = update_flops(model, batches), matmul_rate()
    benchmark.extra_info.update(
        ours=seconds["ours"],
        rivals={name: seconds[name] for name in rivals},
        skipped={"TRL packing": "it refuses images"} if images else {},
        floor_seconds=flops / peak,
        flops=flops,
        matmul_flops_per_second=peak,
        clock=times.clock,
        wall_seconds=times.wall,
        loss=loss,
        useful_tokens=useful,
        stream_tokens=stream,
        micro_batches=len(batches),
        patches=sum(len(batch.patches) for batch in batches),
        useful_tokens_per_second=rate,
        gain=gain,
        load=f"{SAMPLES} samples, {useful} response tokens (longest {max(lengths(SAMPLES))}), {stream} in all",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        trl=trl_version,
    )
    shown = ", ".join(f"{name} {rate[name]:.0f} ({ratio:.2f}x)" for name, ratio in gain.items())
    print(
        f"\nuseful tokens/s: ours {rate['ours']:.0f}, {shown}; floor {useful * peak / flops:.0f} "
        f"(ours at {flops / peak / seconds['ours']:.2f} of it); {times.clock}"
    )
