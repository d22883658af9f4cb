from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from r4b_core.data.batch import PackedBatch
from r4b_core.data.boards import make_alignment
from r4b_core.data.encoding import EncodedPrompt, encode_prompt
from r4b_core.data.packing import Response, describe, pack_alignment, pack_groups_for_rl, pack_sft, unpack
from r4b_core.data.processing import image_to_patches
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import COLOURS, ToyTokenizer, position_word
from r4b_kernels.layout import PrefixLayout

TOKENIZER = ToyTokenizer()


def a_prompt(draw: random.Random) -> EncodedPrompt:
    """A prompt with zero to two images whose pixels tell it from all others."""
    images = [
        np.full((16 * draw.randint(1, 3), 16 * draw.randint(1, 4), 3), draw.randrange(256), np.uint8)
        for _ in range(draw.randint(0, 2))
    ]
    return encode_prompt(TOKENIZER, Sample("a", "read", images, f"digit at #{draw.randint(1, 12)} ?", "1"))


def a_response(draw: random.Random, longest: int = 12) -> Response:
    length = draw.randint(1, longest)
    tokens = [draw.randrange(TOKENIZER.vocab_size) for _ in range(length)]
    old = [-draw.random() for _ in range(length)]
    return Response(tokens, [draw.random() for _ in range(length)], {"old_logprob": old, "advantage": draw.random()})


def a_problem(seed: int) -> tuple[list[EncodedPrompt], list[list[Response]]]:
    draw = random.Random(seed)
    prompts = [a_prompt(draw) for _ in range(draw.randint(1, 6))]
    return prompts, [[a_response(draw) for _ in range(draw.randint(1, 8))] for _ in prompts]


def check_shape(batch: PackedBatch, multiple: int) -> None:
    """What every PackedBatch promises, whatever it holds."""
    total, used = batch.num_tokens, int(batch.layout.offsets[-1])
    assert total % multiple == 0 and total >= multiple
    PrefixLayout.from_lengths(batch.layout.lengths(), batch.layout.parent.tolist())
    assert (batch.tokens[used:] == 0).all() and (batch.position_ids[:, used:] == 0).all()
    assert (batch.vision_index[used:] == -1).all()
    assert batch.tokens.dtype == batch.position_ids.dtype == batch.vision_index.dtype == torch.int64
    assert batch.layout.offsets.dtype == batch.layout.parent.dtype == torch.int32
    rows = batch.num_rows
    assert batch.row_source.shape == batch.row_weight.shape == batch.row_sequence.shape == (rows,)
    assert batch.row_weight.dtype == batch.patches.dtype == torch.float32
    assert ((batch.row_source >= 0) & (batch.row_source < max(used, 1))).all()
    assert int(batch.cu_patches[-1]) == len(batch.patches)
    seen = batch.vision_index[batch.vision_index >= 0]
    assert set(seen.tolist()) == set(range(len(batch.patches)))


def visible(batch: PackedBatch) -> list[tuple]:
    """For each row: the (token, position, patch content) that its hidden state sees, and all that the row carries."""
    offsets, parents = batch.layout.offsets.tolist(), batch.layout.parent.tolist()
    pixels = [round(value, 4) for value in batch.patches[:, 0].tolist()]
    columns = sorted(batch.row_data)

    def entries(start: int, stop: int) -> tuple:
        patches = [
            index if index < 0 else ("patch", pixels[index]) for index in batch.vision_index[start:stop].tolist()
        ]
        return tuple(
            zip(batch.tokens[start:stop].tolist(), batch.position_ids[:, start:stop].T.tolist(), patches, strict=True)
        )

    rows = []
    for row, source in enumerate(batch.row_source.tolist()):
        (segment,) = [s for s in range(len(parents)) if offsets[s] <= source < offsets[s + 1]]
        parent = parents[segment]
        context = entries(offsets[parent], offsets[parent + 1]) if parent >= 0 else ()
        context += entries(offsets[segment], source + 1)
        data = tuple(batch.row_data[name][row].item() for name in columns)
        rows.append((repr(context), batch.row_target[row].item(), batch.row_weight[row].item(), data))
    return rows


def one_by_one(prompts: list[EncodedPrompt], groups: list[list[Response]]) -> Counter:
    """The rows of ``visible``, written down from the prompts and responses without any packing."""
    rows: Counter = Counter()
    for prompt, group in zip(prompts, groups, strict=True):
        pixels = [round(value, 4) for value in prompt.patches[:, 0].tolist()]
        shown = [index if index < 0 else ("patch", pixels[index]) for index in prompt.vision_index.tolist()]
        for response in group:
            tokens = [*prompt.tokens.tolist(), *response.tokens]
            patches = [*shown, *[-1] * len(response.tokens)]
            entries = [(token, [place] * 3, patches[place]) for place, token in enumerate(tokens)]
            for k, target in enumerate(response.tokens):
                weight, old = torch.tensor([response.weight[k], response.columns["old_logprob"][k]]).tolist()
                data = (torch.tensor(response.columns["advantage"]).item(), old)
                rows[repr(tuple(entries[: prompt.num_tokens + k])), target, weight, data] += 1
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_packing_changes_nothing_that_a_row_sees(seed: int) -> None:
    """The multiset of (context, target, weight, columns) is that of the responses one by one, however they are packed:
    prompts shared or repeated, in one bin or many, on one rank or several."""
    prompts, groups = a_problem(seed)
    expected = one_by_one(prompts, groups)
    for share, capacity, ranks, multiple in (
        (True, 4096, 1, 1),
        (False, 4096, 1, 4),
        (True, 96, 2, 8),
        (False, 96, 3, 1),
    ):
        packed = pack_groups_for_rl(prompts, groups, capacity, share_prefix=share, ranks=ranks, multiple=multiple)
        assert len(packed) == ranks and len({len(batches) for batches in packed}) == 1
        rows: Counter = Counter()
        for batch in (batch for batches in packed for batch in batches):
            check_shape(batch, multiple)
            assert batch.num_tokens <= capacity
            rows.update(visible(batch))
        assert rows == expected


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_response_is_once_a_sequence(seed: int, share: bool) -> None:
    prompts, groups = a_problem(seed)
    found = []
    for batches in pack_groups_for_rl(prompts, groups, 96, share_prefix=share, ranks=2):
        for batch in batches:
            sequences = unpack(batch)
            assert set(batch.row_sequence.tolist()) == set(range(batch.num_sequences))
            assert (batch.row_sequence.diff() >= 0).all()
            found += [(tuple(context), tuple(targets)) for context, targets in sequences]
    expected = [
        (tuple(prompt.tokens.tolist()), tuple(response.tokens))
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    assert Counter(found) == Counter(expected)


def test_a_shared_group_has_its_image_once() -> None:
    draw = random.Random(0)
    prompt = encode_prompt(TOKENIZER, Sample("a", "read", [np.zeros((32, 64, 3), np.uint8)], "digit at #1 ?", "1"))
    group = [a_response(draw) for _ in range(8)]
    for share in (True, False):
        ((batch,),) = pack_groups_for_rl([prompt], [group], 4096, share_prefix=share)
        assert batch.image_grid.tolist() == [[1, 2, 4]] and len(batch.patches) == 8
        assert (batch.vision_index >= 0).sum() == (8 if share else 64)
        stream = sum(len(response.tokens) - 1 for response in group)
        assert batch.num_tokens == stream + prompt.num_tokens * (1 if share else 8)
    first = batch.row_sequence.diff(prepend=torch.tensor([-1])) == 1
    assert len(set(batch.row_source[first].tolist())) == 8


def test_first_rows_of_a_shared_group_gather_the_prompts_last_state() -> None:
    draw = random.Random(1)
    prompt, group = a_prompt(draw), [a_response(draw) for _ in range(4)]
    ((batch,),) = pack_groups_for_rl([prompt], [group], 4096)
    first = batch.row_sequence.diff(prepend=torch.tensor([-1])) == 1
    assert batch.row_source[first].tolist() == [prompt.num_tokens - 1] * 4


def test_a_response_of_one_token_takes_no_segment() -> None:
    prompt = a_prompt(random.Random(2))
    ((batch,),) = pack_groups_for_rl([prompt], [[Response([5]), Response([6, 7])]], 4096)
    assert batch.layout.lengths() == [prompt.num_tokens, 1]
    assert batch.row_target.tolist() == [5, 6, 7]
    assert batch.row_source.tolist() == [prompt.num_tokens - 1] * 2 + [prompt.num_tokens]


@pytest.mark.parametrize("seed", range(4))
def test_sft_packs_one_segment_per_item(seed: int) -> None:
    draw = random.Random(seed)
    items = [(a_prompt(draw), a_response(draw)) for _ in range(20)]
    batches = pack_sft(items, 128, multiple=8)
    for batch in batches:
        check_shape(batch, 8)
        assert batch.num_tokens <= 128 and (batch.layout.parent == -1).all()
        assert batch.layout.num_segments == batch.num_sequences
    packed = Counter((tuple(c), tuple(t)) for batch in batches for c, t in unpack(batch))
    assert packed == Counter((tuple(p.tokens.tolist()), tuple(r.tokens)) for p, r in items)


def test_packing_is_deterministic() -> None:
    prompts, groups = a_problem(5)
    first, again = (pack_groups_for_rl(prompts, groups, 128, ranks=2) for _ in range(2))
    for one, two in zip(sum(first, []), sum(again, []), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.row_source, two.row_source)
        assert torch.equal(one.row_data["advantage"], two.row_data["advantage"])


def test_empty_batches_are_whole() -> None:
    prompt = a_prompt(random.Random(3))
    response = Response([1, 2], 1.0, {"advantage": 0.5})
    packed = pack_groups_for_rl([prompt], [[response]], 128, ranks=3, multiple=4)
    empty = [batch for (batch,) in packed if not batch.num_rows]
    assert len(empty) == 2
    for batch in empty:
        check_shape(batch, 4)
        assert batch.num_tokens == 4 and batch.num_sequences == 0 and batch.layout.num_segments == 0
        assert batch.patches.shape == (0, 768) and batch.image_grid.shape == (0, 3)
        assert batch.row_data["advantage"].shape == (0,)
        assert not batch.layout.dense_mask(4).any()
        assert "0 sequences" in describe(batch, TOKENIZER)


def test_static_shapes() -> None:
    prompts, groups = a_problem(6)
    for batches in pack_groups_for_rl(prompts, groups, 200, pad_to=256, multiple=8, ranks=2):
        assert {batch.num_tokens for batch in batches} == {256}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(capacity=100, pad_to=90), "pad_to = 90: must be a multiple of 1 and hold the packing capacity of 100"),
        (dict(capacity=100, pad_to=130, multiple=4), "pad_to = 130"),
        (dict(capacity=2, multiple=4), "capacity = 2 and multiple = 4"),
        (dict(capacity=10), "exceed.* capacity=10"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    prompts, groups = a_problem(7)
    with pytest.raises(ValueError, match=message):
        pack_groups_for_rl(prompts, groups, **settings)


def test_wrong_responses_are_named() -> None:
    prompt = a_prompt(random.Random(4))
    with pytest.raises(ValueError, match="group 0 holds a response without tokens"):
        pack_groups_for_rl([prompt], [[Response([])]], 128)
    with pytest.raises(ValueError, match="column 'weight' has 1 values for a response of 2 tokens"):
        pack_sft([(prompt, Response([1, 2], [1.0]))], 128)
    with pytest.raises(ValueError, match="give all the same"):
        pack_groups_for_rl([prompt], [[Response([1], 1.0, {"advantage": 1.0}), Response([1])]], 128)


def test_capacity_leaves_room_for_padding() -> None:
    """A stream as long as the capacity must not be padded beyond it."""
    prompt = a_prompt(random.Random(8))
    response = Response(list(range(30 - prompt.num_tokens % 2)))
    length = prompt.num_tokens + len(response.tokens) - 1
    assert length % 2 == 1
    with pytest.raises(ValueError, match="capacity"):
        pack_sft([(prompt, response)], length, multiple=2)
    assert pack_sft([(prompt, response)], length + 1, multiple=2)[0].num_tokens == length + 1


def test_alignment_rows_say_what_the_tiles_show() -> None:
    boards = make_alignment("train", 0, "pretrain", 0, 12)
    batches = pack_alignment(TOKENIZER, boards, 64, multiple=4)
    assert len(batches) > 1
    found: Counter = Counter()
    for batch in batches:
        check_shape(batch, 4)
        sources = batch.row_source.view(-1, 3)
        assert (sources == sources[:, :1]).all() and (batch.vision_index[sources] >= 0).all()
        words = TOKENIZER.decode(batch.row_target.tolist()).split()
        patches = batch.patches[batch.vision_index[sources[:, 0]]]
        found.update(
            zip((patch.numpy().tobytes() for patch in patches), words[::3], words[1::3], words[2::3], strict=True)
        )
    expected: Counter = Counter()
    for board in boards:
        patches, _ = image_to_patches(board.image)
        for place, (patch, digit, colour) in enumerate(zip(patches, board.digits, board.colours, strict=True)):
            expected[patch.tobytes(), str(digit), COLOURS[colour], position_word(place)] += 1
    assert found == expected


def test_description_can_be_read() -> None:
    prompt = encode_prompt(TOKENIZER, Sample("a", "read", [np.zeros((16, 32, 3), np.uint8)], "final value ?", "1"))
    group = [Response(TOKENIZER.encode("\n\n</think>7<|im_end|>"), 1.0, {"advantage": -0.5})]
    text = describe(pack_groups_for_rl([prompt], [group], 64, multiple=8)[0][0], TOKENIZER)
    assert "[3 image tokens]final value ?" in text
    assert "segment 1 after 0" in text
    assert r"'\n\n</think>7<|im_end|>' (weight 1, advantage -0.5)" in text
