"""From samples to tokens: prompts with their image tokens expanded, and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from r4b_core.data.batch import PackedBatch
from r4b_core.data.images import ImageError
from r4b_core.data.processing import PromptError, check_question, image_to_patches
from r4b_core.data.quarantine import Quarantine
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import Tokenizer
from r4b_core.modes import FORCED_TEXT, NEWLINE, THINK_OPEN, TURN_END, TURN_START, Mode


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of n tokens with I images of P patches in all; it ends with ``<think>``.

    Attributes:
        tokens: int64 [n].
        vision_index: int64 [n], the patch (of this prompt's) that a token stands for; -1 text, -2 row separator.
        patches: float32 [P, C].
        image_grid: int64 [I, 3], (time, height, width) in patches.
        escaped: tags of the chat template that stood in the user's own text and were made plain text.
    """

    tokens: Tensor
    vision_index: Tensor
    patches: Tensor
    image_grid: Tensor
    escaped: int = field(default=0, kw_only=True)

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def position_ids(self) -> Tensor:
        """int64 [3, n]: the decoder counts image tokens like text."""
        return torch.arange(self.num_tokens).expand(3, -1)

    @property
    def next_position(self) -> int:
        """Position of the first response token."""
        return self.num_tokens


def encode_prompt(tokenizer: Tokenizer, sample: Sample, patch_size: int = 16) -> EncodedPrompt:
    """The prompt of a sample: its images and question in the user's turn, then the assistant's header and ``<think>``.

    An image stands as one token per patch in raster order and one row separator after each row of patches.

    Raises:
        PromptError: if images and ``<image>`` marks do not match, or the question holds a tag.
        ImageError: if an image does not divide into patches.
        ValueError: if the tokenizer does not know a word.
    """
    question = check_question(sample.question, len(sample.images))
    text = f"{TURN_START}user{NEWLINE}{question}{TURN_END}{NEWLINE}{TURN_START}assistant{NEWLINE}{THINK_OPEN}"
    cut = [image_to_patches(image, patch_size) for image in sample.images]
    tokens, vision_index = expand_images(tokenizer, text, tuple(grid for _, grid in cut))
    patches = np.concatenate([patches for patches, _ in cut]) if cut else np.zeros((0, 3 * patch_size**2), np.float32)
    grid = torch.tensor([grid for _, grid in cut], dtype=torch.int64).view(-1, 3)
    return EncodedPrompt(tokens, vision_index, torch.from_numpy(patches), grid)


def encode_response(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """Tokens of the sample's response, from the decision to the turn end.

    The tokens that force its mode are put down as they are and what follows is encoded by itself: a reasoning text that
    begins with a newline would otherwise merge with the decision and turn it into the other one.

    Raises:
        ValueError: if the sample has no response, or one that does not begin as its mode does.
    """
    if not sample.response:
        raise ValueError(f"sample {sample.id!r} has no response: annotate it before training on it")
    mode = decision_of(sample)
    modes = tokenizer.mode_tokens
    tokens = [*modes.forced(mode), *tokenizer.encode(sample.response.removeprefix("".join(FORCED_TEXT[mode])))]
    return tokens if tokens[-1] == modes.turn_end else [*tokens, modes.turn_end]


def decision_of(sample: Sample) -> Mode:
    """The mode that the sample's response begins as; its ``mode`` says which where both are possible.

    Raises:
        ValueError: if it begins as neither, or not as its ``mode``.
    """
    response = sample.response or ""
    for mode in (sample.mode,) if sample.mode in (Mode.DIRECT, Mode.THINKING) else (Mode.DIRECT, Mode.THINKING):
        if response.startswith("".join(FORCED_TEXT[mode])):
            return mode
    expected = f"its mode {sample.mode}" if sample.mode else "either mode"
    raise ValueError(
        f"the response of sample {sample.id!r} begins with {response[:12]!r}, not as {expected} does: "
        f"{FORCED_TEXT[Mode.THINKING]} or {FORCED_TEXT[Mode.DIRECT]}"
    )


def encode_samples(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    quarantine: Quarantine,
    capacity: int,
    response_budget: int | None = None,
    patch_size: int = 16,
    encode: Callable[[Tokenizer, Sample], EncodedPrompt] | None = None,
) -> list[tuple[Sample, EncodedPrompt]]:
    """The samples that can be trained on, with their prompts; the others go to quarantine with the reason.

    ``encode`` makes a sample's prompt as a model family takes it; None is `encode_prompt` with ``patch_size``.
    ``response_budget`` is the room in tokens kept for a response (new tokens of a rollout); None takes the length of
    the sample's own response.
    """
    encode = encode or partial(encode_prompt, patch_size=patch_size)
    kept = []
    for sample in samples:
        try:
            prompt = encode(tokenizer, sample)
            room = len(encode_response(tokenizer, sample)) if response_budget is None else response_budget
        except ImageError as error:
            quarantine.add(sample.id, "image cannot be used", str(error))
        except PromptError as error:
            quarantine.add(sample.id, "question cannot be used", str(error))
        except ValueError as error:
            quarantine.add(sample.id, "text cannot be encoded", str(error))
        else:
            if prompt.num_tokens + room > capacity:
                detail = (
                    f"prompt of {prompt.num_tokens} and response of {room} tokens exceed packing.capacity={capacity}"
                )
                quarantine.add(sample.id, "longer than the packing capacity", detail)
            else:
                kept.append((sample, prompt))
    return kept


@lru_cache(maxsize=4096)
def expand_images(tokenizer: Tokenizer, text: str, grids: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, Tensor]:
    """(tokens, vision_index), int64 [n] each, of a text whose image tokens are expanded. The results are shared."""
    tokens: list[int] = []
    index: list[int] = []
    images = iter(grids)
    first = 0
    for token in tokenizer.encode(text):
        if token != tokenizer.image_token:
            tokens.append(token)
            index.append(PackedBatch.TEXT_INDEX)
            continue
        time, rows, columns = next(images)
        for _ in range(time * rows):
            index += [*range(first, first + columns), PackedBatch.NEWLINE_INDEX]
            first += columns
        tokens += [token] * (time * rows * (columns + 1))
    assert next(images, None) is None, "check_question left one image token per image"
    return torch.tensor(tokens), torch.tensor(index)
