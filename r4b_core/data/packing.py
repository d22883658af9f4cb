"""From encoded prompts and responses to PackedBatch, for SFT, RL and alignment.

The last token of a response is a target but predicts nothing, so it takes no place in the stream. Everything here runs
on the host and is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from r4b_core.data.batch import PackedBatch
from r4b_core.data.boards import AlignmentBoard
from r4b_core.data.encoding import EncodedPrompt, expand_images
from r4b_core.data.processing import image_to_patches
from r4b_core.data.tokenizer import COLOURS, DIGITS, MAX_TILES, Tokenizer, position_word
from r4b_core.modes import IMAGE
from r4b_kernels.layout import PrefixLayout
from r4b_kernels.pack_groups import pack_groups

PerToken = float | Sequence[float]


@dataclass(frozen=True)
class Response:
    """A response and what its loss rows carry.

    Attributes:
        tokens: everything after ``<think>``, at least one.
        weight: loss weight, one for all tokens or one each.
        columns: further row columns (``old_logprob``, ``advantage``, ...), one value for all tokens or one each.
    """

    tokens: Sequence[int]
    weight: PerToken = 1.0
    columns: Mapping[str, PerToken] = field(default_factory=dict)


def pack_sft(
    items: Sequence[tuple[EncodedPrompt, Response]],
    capacity: int,
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    pad_token: int = 0,
) -> list[PackedBatch]:
    """Pack prompts with one response each: one segment per item, loss rows for every response token.

    Args:
        items: prompts and responses; sequence numbers follow their order within a batch.
        capacity: most tokens of a stream.
        multiple: T becomes a multiple of it (tensor parallel x context parallel size).
        pad_to: T becomes exactly this (static shapes).
        pad_token: fills the padding.

    Raises:
        ValueError: if an item exceeds the capacity, a response is empty, or capacity, multiple and pad_to disagree.
    """
    prompts, groups = [prompt for prompt, _ in items], [[response] for _, response in items]
    (batches,) = pack_groups_for_rl(
        prompts, groups, capacity, share_prefix=False, multiple=multiple, pad_to=pad_to, pad_token=pad_token
    )
    return batches


def pack_groups_for_rl(
    prompts: Sequence[EncodedPrompt],
    groups: Sequence[Sequence[Response]],
    capacity: int,
    *,
    share_prefix: bool = True,
    multiple: int = 1,
    pad_to: int | None = None,
    ranks: int = 1,
    pad_token: int = 0,
) -> list[list[PackedBatch]]:
    """Pack groups of responses to the same prompt; the batches of each rank, as many on each.

    With ``share_prefix`` a prompt is one segment, the parent of one segment per response. Without, each response is a
    segment that begins with a copy of the prompt. Either way a prompt's patches are once in a batch. A response's first
    token is predicted by the prompt's last hidden state. Where a group is cut, its prompt is in both batches.

    Args:
        prompts: one per group.
        groups: the responses to each prompt; all name the same columns.
        capacity, multiple, pad_to, pad_token: as for ``pack_sft``.
        ranks: data-parallel ranks. Some may get empty batches: padding only, no rows.

    Raises:
        ValueError: if a prompt with one response exceeds the capacity, a response is empty, columns differ, or
            capacity, multiple and pad_to disagree.
    """
    capacity = usable_capacity(capacity, multiple, pad_to)
    for index, group in enumerate(groups):
        if any(len(response.tokens) == 0 for response in group):
            raise ValueError(f"group {index} holds a response without tokens: leave it out or give it its turn end")
    names = tuple(next((tuple(response.columns) for response in chain.from_iterable(groups)), ()))
    plan = pack_groups(
        [prompt.num_tokens for prompt in prompts],
        [[len(response.tokens) - 1 for response in group] for group in groups],
        capacity,
        ranks=ranks,
        share_prefix=share_prefix,
        vision_cost=[float(len(prompt.patches)) for prompt in prompts],
    )
    batches: list[list[PackedBatch]] = []
    for bins in plan.ranks:
        batches.append([])
        for members in bins or [[]]:
            chosen = [(prompts[group], [groups[group][k] for k in responses]) for group, responses in members]
            patch_values = prompts[0].patches.shape[1] if prompts else 0
            batches[-1].append(_assemble(chosen, share_prefix, names, patch_values, multiple, pad_to, pad_token))
    return batches


def pack_sequence(
    items: Sequence[tuple[EncodedPrompt, Response]],
    patch_values: int,
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    pad_token: int = 0,
) -> PackedBatch:
    """One batch of all items in their order, as `pack_sft` lays them out; without items it is padding alone.

    The caller sees to the capacity. ``patch_values`` is C, values per patch.
    """
    names = tuple(items[0][1].columns) if items else ()
    chosen = [(prompt, [response]) for prompt, response in items]
    return _assemble(chosen, False, names, patch_values, multiple, pad_to, pad_token)


def pack_alignment(
    tokenizer: Tokenizer,
    boards: Sequence[AlignmentBoard],
    capacity: int,
    *,
    multiple: int = 1,
    pad_to: int | None = None,
    patch_size: int = 16,
) -> list[PackedBatch]:
    """Pack bare images, one segment each; every image token has three loss rows: its digit, its colour, its position.

    A stand-in for R-4B's pre-training: each visual token learns to say what it shows and where. Sequences are images.

    Raises:
        ValueError: if an image exceeds the capacity, or capacity, multiple and pad_to disagree.
    """
    capacity = usable_capacity(capacity, multiple, pad_to)
    places = [position_word(index) for index in range(MAX_TILES)]
    words = {word: tokenizer.encode(word)[0] for word in (*DIGITS, *COLOURS, *places)}
    place_tokens = torch.tensor([words[place] for place in places])
    digit_tokens = torch.tensor([words[digit] for digit in DIGITS])
    colour_tokens = torch.tensor([words[colour] for colour in COLOURS])
    prompts = []
    for board in boards:
        patches, grid = image_to_patches(board.image, patch_size)
        tokens, index = expand_images(tokenizer, IMAGE, (grid,))
        prompts.append(EncodedPrompt(tokens, index, torch.from_numpy(patches), torch.tensor([grid])))
    plan = pack_groups([0] * len(prompts), [[prompt.num_tokens] for prompt in prompts], capacity)
    batches = []
    for members in plan.ranks[0]:
        chosen = [group for group, _ in members]
        bare: list[tuple[EncodedPrompt, list[Response]]] = [(prompts[group], []) for group in chosen]
        batch = _assemble(bare, True, (), 3 * patch_size**2, multiple, pad_to, tokenizer.pad_token)
        source = (batch.vision_index >= 0).nonzero().squeeze(1)
        digits = digit_tokens[torch.cat([torch.from_numpy(boards[group].digits) for group in chosen])]
        colours = colour_tokens[torch.cat([torch.from_numpy(boards[group].colours) for group in chosen])]
        tiles = torch.tensor([len(boards[group].digits) for group in chosen])
        positions = torch.cat([place_tokens[: len(boards[group].digits)] for group in chosen])
        batch.row_source = source.repeat_interleave(3)
        batch.row_target = torch.stack([digits, colours, positions], 1).flatten()
        batch.row_weight = torch.ones(len(batch.row_source))
        batch.row_sequence = torch.arange(len(chosen)).repeat_interleave(3 * tiles)
        batch.num_sequences = len(chosen)
        batches.append(batch)
    return batches


def unpack(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(context, targets) of each sequence: the tokens that its first row sees, parent included, and its targets."""
    offsets, parents, tokens = batch.layout.offsets.tolist(), batch.layout.parent.tolist(), batch.tokens.tolist()
    sequences: list[tuple[list[int], list[int]]] = [([], []) for _ in range(batch.num_sequences)]
    rows = (batch.row_source, batch.row_target, batch.row_sequence)
    for source, target, sequence in zip(*(column.tolist() for column in rows), strict=True):
        context, targets = sequences[sequence]
        if not targets:
            segment = max(s for s in range(len(parents)) if offsets[s] <= source)
            if (parent := parents[segment]) >= 0:
                context += tokens[offsets[parent] : offsets[parent + 1]]
            context += tokens[offsets[segment] : source + 1]
        targets.append(target)
    return sequences


def describe(batch: PackedBatch, tokenizer: Tokenizer) -> str:
    """The batch as text for people: its segments with their parents, then each sequence with its targets."""
    offsets, parents = batch.layout.offsets.tolist(), batch.layout.parent.tolist()
    lines = [
        f"{batch.num_tokens} tokens ({batch.num_tokens - offsets[-1]} padding), {len(parents)} segments, "
        f"{len(batch.image_grid)} images of {len(batch.patches)} patches, {batch.num_sequences} sequences, "
        f"{batch.num_rows} loss rows"
    ]
    for segment, parent in enumerate(parents):
        here = slice(offsets[segment], offsets[segment + 1])
        text = tokenizer.decode(batch.tokens[here].tolist())
        shown = sum(index != PackedBatch.TEXT_INDEX for index in batch.vision_index[here].tolist())
        text = text.replace(IMAGE * shown, f"[{shown} image tokens]") if shown else text
        lines.append(f"segment {segment}{f' after {parent}' if parent >= 0 else ''}: {text!r}")
    for sequence, (context, targets) in enumerate(unpack(batch)):
        mine = batch.row_sequence == sequence
        columns = {"weight": batch.row_weight, **batch.row_data}
        means = ", ".join(f"{name} {column[mine].mean():.4g}" for name, column in columns.items())
        lines.append(f"sequence {sequence}: after {len(context)} tokens {tokenizer.decode(targets)!r} ({means})")
    return "\n".join(lines)


def usable_capacity(capacity: int, multiple: int, pad_to: int | None) -> int:
    """The capacity that leaves room for padding to a multiple."""
    if multiple < 1 or capacity < multiple:
        raise ValueError(f"capacity = {capacity} and multiple = {multiple}: need 1 <= multiple <= capacity")
    if pad_to is None:
        return capacity - capacity % multiple
    if pad_to % multiple or pad_to < capacity:
        raise ValueError(
            f"pad_to = {pad_to}: must be a multiple of {multiple} and hold the packing capacity of {capacity} tokens"
        )
    return capacity


def _assemble(
    chosen: Sequence[tuple[EncodedPrompt, Sequence[Response]]],
    share_prefix: bool,
    names: tuple[str, ...],
    patch_values: int,
    multiple: int,
    pad_to: int | None,
    pad_token: int,
) -> PackedBatch:
    """One batch from prompts and their responses, in order. An empty response segment is left out of the layout."""
    lengths: list[int] = []
    parents: list[int] = []
    copies: list[int] = []
    copy_start: list[int] = []
    response_start: list[int] = []
    prompt_end: list[int] = []
    first_position: list[int] = []
    end = 0
    for number, (prompt, responses) in enumerate(chosen):
        prompt_segment = len(lengths)
        for copy in range(1 if share_prefix else len(responses)):
            copies.append(number)
            copy_start.append(end)
            end += prompt.num_tokens
            if not share_prefix:
                response_start.append(end)
                prompt_end.append(end - 1)
                end += len(responses[copy].tokens) - 1
            lengths.append(end - copy_start[-1])
            parents.append(-1)
        for response in responses if share_prefix else ():
            response_start.append(end)
            prompt_end.append(copy_start[-1] + prompt.num_tokens - 1)
            if length := len(response.tokens) - 1:
                end += length
                lengths.append(length)
                parents.append(prompt_segment)
        first_position += [prompt.next_position] * len(responses)

    total = max(-(-max(end, 1) // multiple) * multiple, pad_to or 0)
    tokens = torch.full((total,), pad_token)
    positions = torch.zeros(3, total, dtype=torch.int64)
    vision_index = torch.full((total,), PackedBatch.TEXT_INDEX)
    if copies:
        patch_counts = torch.tensor([len(prompt.patches) for prompt, _ in chosen])
        first_patch = (patch_counts.cumsum(0) - patch_counts)[torch.tensor(copies)]
        size = torch.tensor([chosen[number][0].num_tokens for number in copies])
        place = _ranges(torch.tensor(copy_start), size)
        tokens[place] = torch.cat([chosen[number][0].tokens for number in copies])
        positions[:, place] = torch.cat([chosen[number][0].position_ids for number in copies], 1)
        index = torch.cat([chosen[number][0].vision_index for number in copies])
        vision_index[place] = torch.where(index >= 0, index + first_patch.repeat_interleave(size), index)

    responses = [response for _, members in chosen for response in members]
    count = torch.tensor([len(response.tokens) for response in responses], dtype=torch.int64)
    target = torch.tensor(list(chain.from_iterable(response.tokens for response in responses)), dtype=torch.int64)
    source = _ranges(torch.tensor(response_start, dtype=torch.int64) - 1, count)
    first_row = count.cumsum(0) - count
    source[first_row] = torch.tensor(prompt_end, dtype=torch.int64)
    in_stream = torch.ones(len(target), dtype=torch.bool)
    in_stream[first_row + count - 1] = False
    place = _ranges(torch.tensor(response_start, dtype=torch.int64), count - 1)
    tokens[place] = target[in_stream]
    positions[:, place] = _ranges(torch.tensor(first_position, dtype=torch.int64), count - 1)

    lengths_of = [len(response.tokens) for response in responses]
    prompts = [prompt for prompt, _ in chosen]
    return PackedBatch(
        tokens=tokens,
        position_ids=positions,
        layout=PrefixLayout.from_lengths(lengths, parents),
        row_source=source,
        row_target=target,
        row_weight=_column("weight", [response.weight for response in responses], lengths_of),
        row_sequence=torch.arange(len(responses)).repeat_interleave(count),
        patches=torch.cat([prompt.patches for prompt in prompts]) if prompts else torch.zeros(0, patch_values),
        image_grid=torch.cat([prompt.image_grid for prompt in prompts])
        if prompts
        else torch.zeros(0, 3, dtype=torch.int64),
        vision_index=vision_index,
        num_sequences=len(responses),
        row_data={name: _column(name, _named(name, names, responses), lengths_of) for name in names},
    )


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64: start, start + 1, ... of each range, one after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _named(name: str, names: tuple[str, ...], responses: Sequence[Response]) -> list[PerToken]:
    for response in responses:
        if response.columns.keys() != set(names):
            raise ValueError(
                f"a response has the columns {sorted(response.columns)} and the first one {sorted(names)}: "
                "give all the same"
            )
    return [response.columns[name] for response in responses]


def _column(name: str, values: Sequence[PerToken], lengths: Sequence[int]) -> Tensor:
    """float32 [R] from one value or one per token of each response."""
    column: list[float] = []
    for value, length in zip(values, lengths, strict=True):
        if isinstance(value, float | int):
            column += [value] * length
        elif len(value) == length:
            column += value
        else:
            raise ValueError(f"column {name!r} has {len(value)} values for a response of {length} tokens")
    return torch.tensor(column, dtype=torch.float32)
