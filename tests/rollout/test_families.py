"""The embedded engine on both model families, against transformers' `generate` and the training forward."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from r4b_core.config.recipe import ParallelConfig
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.data.schema import Sample
from r4b_core.models.convert import load_weights, read_config
from r4b_core.models.families import build_model
from r4b_core.models.r4b.processing import encode_prompt
from r4b_core.modes import Mode, ModeTokens
from r4b_core.parallel.runtime import Runtime
from r4b_core.rollout.engine import EmbeddedEngine
from r4b_core.rollout.sampling import request_seed
from r4b_core.rollout.types import Request, SamplingParams
from r4b_kernels import linear_logprob
from tests.models import qwen3_vl_oracle
from tests.models.build import one_batch
from tests.models.convert_cases import TILES, TOKENIZER, their_model, write_theirs
from tests.models.processing_oracle import onevision_image_processor, onevision_processor, photographs

MODES = ModeTokens(think_open=3, think_close=4, newline=5, blank_line=6, turn_end=2)
NEVER = 10_000
QUESTIONS = {
    "What is the capital?": [],
    "What is this?": ["china"],
    "Which is <image> and which <image>?": ["column", "flower"],
    "Is <image> it?": ["portrait"],
}
GRIDS: list[tuple[int, list[tuple[int, int]], int]] = [
    (5, [], 1),
    (3, [(4, 6)], 2),
    (2, [(2, 4), (6, 2)], 3),
    (0, [(2, 8)], 9),
]


@dataclass
class Sides:
    """Our model and theirs with the same weights, and prompts for both: text, one image, two, one again."""

    ours: Any
    theirs: nn.Module
    vocabulary: int
    prompts: list[EncodedPrompt]
    inputs: list[dict[str, Tensor]]
    folder: Path

    def generate(self, prompt: int, tokens: int) -> tuple[list[int], Tensor]:
        """transformers' greedy tokens of one prompt, and their log-probs over the tokenizer's vocabulary."""
        if hasattr(self.theirs.model, "rope_deltas"):
            self.theirs.model.rope_deltas = None
        out = self.theirs.generate(
            **self.inputs[prompt],
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(range(self.vocabulary, self.ours.shape.vocab_size)),
            return_dict_in_generate=True,
            output_logits=True,
        )
        drawn = out.sequences[0, self.inputs[prompt]["input_ids"].shape[1] :]
        logits = torch.stack(out.logits, 1)[0, :, : self.vocabulary]
        return drawn.tolist(), logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)

    def training_forward(self, prompt: int, tokens: Sequence[int], temperature: float) -> Tensor:
        batch = one_batch(self.prompts[prompt], tokens)
        with torch.no_grad():
            weight = self.ours.head_weight()[: self.vocabulary]
            return linear_logprob(self.ours(batch), weight, batch.row_target, temperature=temperature)[0].float()


def r4b(folder: Path) -> Sides:
    images = onevision_image_processor(TILES.sizes)
    images.size = {"height": TILES.tile_size, "width": TILES.tile_size}
    processor = onevision_processor(TOKENIZER, images, TILES.patches_per_tile)
    prompts, inputs = [], []
    for text, names in QUESTIONS.items():
        pictures = [photographs()[name] for name in names]
        prompts.append(encode_prompt(TOKENIZER, Sample("a", "s", pictures, text, ""), TILES))
        marked = text if "<image>" in text else "<image>\n" * len(names) + text
        rendered = f"<|im_start|>user\n{marked}<|im_end|>\n<|im_start|>assistant\n<think>"
        shown = [[Image.fromarray(picture) for picture in pictures]] if names else None
        inputs.append(dict(processor(images=shown, text=[rendered], return_tensors="pt")))
    return Sides(
        load("r4b", True, folder), their_model("r4b", True), len(TOKENIZER.pretrained), prompts, inputs, folder
    )


def qwen3_vl(folder: Path) -> Sides:
    model = load("qwen3_vl", False, folder)
    generator = torch.Generator().manual_seed(4)
    prompts = [qwen3_vl_oracle.random_prompt(generator, model.shape, *layout) for layout in GRIDS]
    inputs = []
    for prompt in prompts:
        tokens = prompt.tokens[None]
        inputs.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        if len(prompt.patches):
            inputs[-1] |= dict(
                pixel_values=qwen3_vl_oracle.their_patches(prompt.patches, model.shape),
                image_grid_thw=prompt.image_grid,
                mm_token_type_ids=(tokens == qwen3_vl_oracle.IMAGE_TOKEN).int(),
            )
    return Sides(model, their_model("qwen3_vl", False), 60, list(prompts), inputs, folder)


def load(family: str, tie: bool, folder: Path) -> Any:
    write_theirs(folder, family, tie)
    return read(folder)


def read(folder: Path, **changes: Any) -> Any:
    model = build_model(read_config(folder).model_copy(update=changes), ParallelConfig(), seed=0)
    load_weights(model, folder)
    return model


@pytest.fixture(scope="module", params=[r4b, qwen3_vl], ids=lambda make: make.__name__)
def sides(request: pytest.FixtureRequest, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return request.param(tmp_path_factory.mktemp("checkpoint"))


def requests_for(sides: Sides) -> list[Request]:
    modes = [Mode.THINKING, Mode.DIRECT, Mode.AUTO]
    return [Request(p, mode, request_seed(p, k)) for p in range(len(sides.prompts)) for k, mode in enumerate(modes)]


@pytest.mark.parametrize("batch", [8, 3])
def test_greedy_tokens_and_logprobs_equal_transformers(sides: Sides, batch: int) -> None:
    """All prompts in one batch (or handed on as places get free) are what `generate` makes of each alone."""
    engine = EmbeddedEngine(sides.ours, replace(MODES, turn_end=NEVER), sides.vocabulary, batch, prefill_tokens=60)
    requests = [Request(p, Mode.AUTO, 0) for p in range(len(sides.prompts))]
    drawn = engine.generate(sides.prompts, requests, SamplingParams(12, temperature=0.0))
    for request, rollout in zip(requests, drawn, strict=True):
        tokens, logprobs = sides.generate(request.prompt, 12)
        assert rollout.tokens == tokens
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, rtol=1e-5, atol=1e-5)
    assert len({tuple(rollout.tokens) for rollout in drawn}) == len(drawn)


def test_logprobs_are_those_of_the_training_forward(sides: Sides) -> None:
    engine, requests = EmbeddedEngine(sides.ours, MODES, sides.vocabulary, batch=5), requests_for(sides)
    drawn = engine.generate(sides.prompts, requests, SamplingParams(16, temperature=0.8))
    for request, rollout in zip(requests, drawn, strict=True):
        want = sides.training_forward(request.prompt, rollout.tokens, 0.8)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, rtol=0, atol=2e-5)


def test_half_precision(sides: Sides) -> None:
    """Measured 0.05 at log-probs of -4 to -10: bfloat16 keeps eight bits."""
    half = replace(sides, ours=read(sides.folder, dtype="bfloat16"))
    engine, requests = EmbeddedEngine(half.ours, MODES, half.vocabulary), requests_for(half)
    for request, rollout in zip(requests, engine.generate(half.prompts, requests, SamplingParams(8)), strict=True):
        want = half.training_forward(request.prompt, rollout.tokens, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), want, rtol=0, atol=0.1)


class NamedDevices(TorchFunctionMode):
    """Fails where code of the rollouts makes a tensor without saying where, or elsewhere than on ``device``."""

    FACTORIES = frozenset({torch.tensor, torch.zeros, torch.empty, torch.ones, torch.full, torch.arange})

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        module = sys._getframe(1).f_globals["__name__"]
        if function in self.FACTORIES and module.startswith("r4b_core.rollout"):
            self.seen += 1
            assert kwargs.get("device") == self.device, (
                f"{module}: torch.{function.__name__} without the model's device"
            )
        return function(*args, **kwargs)


def test_every_tensor_is_made_on_the_models_device(sides: Sides) -> None:
    """There is no GPU here: what would lie on the wrong device is found by who makes it."""
    engine, requests = EmbeddedEngine(sides.ours, MODES, sides.vocabulary, batch=4), requests_for(sides)
    with NamedDevices(engine.device) as mode:
        engine.generate(sides.prompts, requests, SamplingParams(4, top_p=0.9))
        list(engine.stream(sides.prompts[1], requests[0], SamplingParams(3)))
    assert mode.seen > 20
