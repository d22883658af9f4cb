"""From padded batches, in which every completion brings its prompt, to a stream in which a prompt stands once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r4b_kernels.layout import PrefixLayout


class SharedPrompts(NamedTuple):
    """A packed batch of B completions of up to C tokens.

    Attributes:
        ids: int64 [T].
        position_ids: int64 [T]; a completion counts on where its prompt ended.
        layout: each prompt a segment, each completion a child of its prompt.
        rows: int64 [B, C], the row of the stream whose state predicts each completion token; 0 where that is padding.
    """

    ids: Tensor
    position_ids: Tensor
    layout: PrefixLayout
    rows: Tensor


def share_prompts(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> SharedPrompts:
    """Pack a batch of text; completions whose prompts are the same tokens share one copy.

    Waits for the device: the layout is made on the host.

    Args:
        prompt_ids: int64 [B, P], and prompt_mask [B, P] with 1 for tokens, padded on the left.
        completion_ids: int64 [B, C], and completion_mask [B, C], padded on the right; may be empty.

    Raises:
        ValueError: for padding inside a prompt or a completion, or on the other side, and for an empty prompt.
    """
    if bool((prompt_mask.diff(dim=1) < 0).any()) or bool((completion_mask.diff(dim=1) > 0).any()):
        raise ValueError("prompts must be padded on the left, completions on the right, and neither inside")
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty: its completion's first token has no state before it")
    members: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(tuple(prompt), []).append(index)

    lengths: list[int] = []
    parents: list[int] = []
    pieces, counted, end = [], [], 0
    sizes, completions = completion_mask.sum(1).tolist(), completion_ids.cpu()
    rows = torch.zeros(completion_ids.shape, dtype=torch.int64)
    for prompt, indices in members.items():
        parent, last = len(lengths), end + len(prompt) - 1
        pieces.append(torch.tensor(prompt))
        counted.append(torch.arange(len(prompt)))
        lengths.append(len(prompt))
        parents.append(-1)
        end += len(prompt)
        for index in indices:
            size = int(sizes[index])
            pieces.append(completions[index, :size])
            counted.append(torch.arange(len(prompt), len(prompt) + size))
            rows[index, :size] = torch.arange(end - 1, end - 1 + size)
            rows[index, : min(size, 1)] = last
            lengths.append(size)
            parents.append(parent)
            end += size
    device = completion_ids.device
    layout = PrefixLayout.from_lengths(lengths, parents, device)
    return SharedPrompts(torch.cat(pieces).to(device), torch.cat(counted).to(device), layout, rows.to(device))
