from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from r4b_core.config.recipe import DataConfig
from r4b_core.data import boards
from r4b_core.data.boards import fingerprint, make_alignment, make_samples, write_response
from r4b_core.data.schema import Sample
from r4b_core.data.tokenizer import COLOURS, ToyTokenizer
from r4b_core.modes import Mode

MIX = {"read": 0.2, "count": 0.2, "value": 0.6}
TOKENIZER = ToyTokenizer()


def solve(sample: Sample) -> int:
    """The answer, worked out from the board's text alone."""
    tiles = sample.provenance["board"].split()
    words = sample.question.split()
    if sample.source == "read":
        return int(tiles[int(words[2].removeprefix("#")) - 1][-1])
    if sample.source == "count":
        symbol = {"orange": "+", "blue": "*", "green": "="}[words[1]]
        return sum(tile.startswith(symbol) for tile in tiles)
    value = int(tiles[0])
    for symbol, digit in tiles[1:]:
        value = {"+": value + int(digit), "*": value * int(digit), "=": int(digit)}[symbol] % 10
    return value


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [sample for step in range(20) for sample in make_samples("train", 3, "anneal", step, 100, MIX)]


def test_answers_are_right(samples: list[Sample]) -> None:
    assert all(int(sample.answer) == solve(sample) for sample in samples)
    assert len({sample.id for sample in samples}) == len(samples)


def test_families_and_difficulties_have_their_shares(samples: list[Sample]) -> None:
    families = Counter(sample.source for sample in samples)
    assert families == {"read": 400, "count": 400, "value": 1200}
    values = Counter(sample.difficulty for sample in samples if sample.source == "value")
    assert 0.16 < values["easy"] / 1200 < 0.24
    assert 0.34 < values["mid"] / 1200 < 0.46
    assert all(sample.difficulty == "easy" for sample in samples if sample.source != "value")


def test_operations_have_their_shares(samples: list[Sample]) -> None:
    tiles = [sample.provenance["board"].split()[1:] for sample in samples if sample.source == "value"]
    before_last = Counter(tile[0] for board in tiles for tile in board[:-1])
    assert before_last["="] == 0
    assert 0.31 < before_last["*"] / before_last.total() < 0.39
    assert {tile[1] for board in tiles for tile in board if tile[0] == "*"} == set("379")
    assert {tile[1] for board in tiles for tile in board if tile[0] == "+"} == set("123456789")
    lengths = Counter(map(len, tiles))
    assert set(lengths) == set(range(1, 9))
    assert 0.46 < (lengths[1] + lengths[2]) / len(tiles) < 0.54


def test_answers_to_values_are_balanced(samples: list[Sample]) -> None:
    answers = Counter(sample.answer for sample in samples if sample.source == "value")
    assert len(answers) == 10
    assert max(answers.values()) < 1.5 * min(answers.values())


def test_a_step_does_not_depend_on_others() -> None:
    def drawn(*where: object) -> list[tuple]:
        made = make_samples(*where, 8, MIX)
        return [(s.id, s.question, s.answer, s.images[0].tobytes()) for s in made]

    step = drawn("train", 0, "anneal", 5)
    drawn("train", 0, "anneal", 4)
    assert drawn("train", 0, "anneal", 5) == step
    for other in (
        ("train", 0, "anneal", 6),
        ("train", 1, "anneal", 5),
        ("train", 0, "bpo", 5),
        ("held_out", 0, "anneal", 5),
    ):
        assert [row[3] for row in drawn(*other)] != [row[3] for row in step]


def test_picture_shows_the_board(samples: list[Sample]) -> None:
    """Each tile's edge has its operation's colour; unused places are black."""
    shades = boards._tile_grounds()[:, 0, 0]
    symbols = {"+": 1, "*": 2, "=": 3}
    for sample in samples[:200]:
        image, tiles = sample.images[0], sample.provenance["board"].split()
        assert image.shape == (-(-len(tiles) // 4) * 16, 64, 3) and image.dtype == np.uint8
        for place in range(image.shape[0] // 16 * 4):
            y, x = divmod(place, 4)
            tile = image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].astype(float)
            if place >= len(tiles):
                assert not tile.any()
                continue
            pixels = tile.reshape(-1, 3)
            edge = pixels[pixels.sum(axis=1).argmin()]
            distance = np.abs(shades - edge).sum(axis=1)
            assert distance.argmin() == symbols.get(tiles[place][0], 0)
            assert tile[3:13, 3:13].max() > 200


def test_splits_share_no_digit() -> None:
    train, train_sizes = boards._class_table("train", 0.25)
    held_out, held_out_sizes = boards._class_table("held_out", 0.25)
    for digit in range(10):
        mine = set(train[digit, : train_sizes[digit]].tolist())
        kept = set(held_out[digit, : held_out_sizes[digit]].tolist())
        assert not mine & kept
        assert {int(boards._digits()[1][index]) for index in mine | kept} == {digit}
        assert abs(len(kept) / (len(mine) + len(kept)) - 0.25) < 0.01
    assert train_sizes.sum() + held_out_sizes.sum() == 1775


def test_held_out_digits_are_not_augmented() -> None:
    plain = {tuple(image.ravel().round(4)) for image in boards._upsampled()}
    board = make_alignment("held_out", 0, "a", 0, 1)[0]
    tile = board.image[:16, :16].astype(np.float32)
    ground = boards._tile_grounds()[board.colours[0]]
    ink = ((tile - ground) / (boards._INK - ground)).mean(axis=2)
    closest = min(np.abs(ink - np.array(image).reshape(16, 16)).max() for image in plain)
    assert closest < 0.01


@pytest.mark.parametrize(
    ("difficulty", "mix", "operations"),
    [("hard", MIX, range(3, 9)), ("mid", {"value": 1.0}, range(1, 3)), ("easy", {"value": 1.0}, range(1, 9))],
)
def test_difficulty_filter(difficulty: str, mix: dict[str, float], operations: range) -> None:
    made = make_samples("held_out", 0, "eval", 0, 200, mix, difficulty)
    assert {sample.difficulty for sample in made} == {difficulty}
    assert {sample.source for sample in made} == {"value"}
    assert {len(sample.provenance["board"].split()) - 1 for sample in made} == set(operations)
    if difficulty == "easy":
        assert all("=" in sample.provenance["board"].split()[-1] for sample in made)


def test_easy_filter_keeps_the_mix() -> None:
    made = make_samples("held_out", 0, "eval", 0, 100, {"read": 1.0, "count": 1.0}, "easy")
    assert Counter(sample.source for sample in made) == {"read": 50, "count": 50}


@pytest.mark.parametrize("most", [1, 2, 3, 11])
def test_number_of_operations_is_bounded(most: int) -> None:
    config = DataConfig(max_operations=most)
    made = make_samples("train", 0, "anneal", 0, 300, MIX, config=config)
    assert {len(sample.provenance["board"].split()) - 1 for sample in made} == set(range(1, most + 1))
    for sample in made:
        TOKENIZER.encode(write_response(sample, Mode.THINKING))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", MIX, None), "split = 'test' is unknown: choose one of train, held_out"),
        (("train", {"sum": 1.0}, None), "unknown family 'sum'"),
        (("train", {"read": 1.0}, "hard"), "leaves nothing to draw for difficulty 'hard'"),
        (("train", {}, None), "leaves nothing to draw"),
        (("train", {"read": -1.0, "count": 2.0}, None), "leaves nothing to draw"),
        (("train", MIX, "tough"), "difficulty = 'tough' is unknown"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple, message: str) -> None:
    split, mix, difficulty = arguments
    with pytest.raises(ValueError, match=message):
        make_samples(split, 0, "s", 0, 4, mix, difficulty)


def test_hard_boards_need_three_operations() -> None:
    with pytest.raises(ValueError, match="max_operations >= 3"):
        make_samples("train", 0, "s", 0, 4, MIX, "hard", DataConfig(max_operations=2))


def test_responses_spell_the_mode_and_the_answer(samples: list[Sample]) -> None:
    modes = TOKENIZER.mode_tokens
    for sample in samples[:300]:
        for mode in (Mode.THINKING, Mode.DIRECT):
            tokens = TOKENIZER.encode(write_response(sample, mode))
            reasoning, answer = modes.split(tokens)
            assert modes.mode_of(tokens) is mode
            assert TOKENIZER.decode(answer) == sample.answer
            assert tokens[-1] == modes.turn_end
            assert (len(tokens) == 4) if mode is Mode.DIRECT else reasoning


def test_thinking_lengths(samples: list[Sample]) -> None:
    """The cost of a trace: 10.5 tokens for 1-2 operations, 22.5 for 3-8, at most 12 for reading."""
    lengths: dict[str, list[int]] = {}
    for sample in samples:
        trace = len(TOKENIZER.encode(write_response(sample, Mode.THINKING)))
        lengths.setdefault(f"{sample.source} {sample.difficulty}", []).append(trace)
    assert abs(np.mean(lengths["value mid"]) - 10.5) < 0.3
    assert abs(np.mean(lengths["value hard"]) - 22.5) < 0.5
    assert max(lengths["value hard"]) <= 30
    assert max(lengths["read easy"]) <= 12


def test_traces_hold_the_running_value() -> None:
    sample = Sample("a", "value", [], "final value ?", "9", provenance={"board": "4 +3 *7"})
    assert write_response(sample, Mode.THINKING) == "\n#1 4 #2 +3 7 #3 *7 9</think>9<|im_end|>"
    sample = Sample("a", "count", [], "count orange ?", "2", provenance={"board": "4 +3 =7 +1"})
    assert write_response(sample, Mode.THINKING) == "\n#1 0 #2 1 #3 1 #4 2</think>2<|im_end|>"
    sample = Sample("a", "read", [], "digit at #3 ?", "7", provenance={"board": "4 +3 =7 +1"})
    assert write_response(sample, Mode.THINKING) == "\n#3 green 7</think>7<|im_end|>"


def test_a_response_needs_a_mode_and_a_board() -> None:
    with pytest.raises(ValueError, match="mode auto leaves the decision"):
        write_response(Sample("a", "value", [], "q", "1", provenance={"board": "1"}), Mode.AUTO)
    with pytest.raises(ValueError, match="'a' carries no board"):
        write_response(Sample("a", "value", [], "q", "1"), Mode.DIRECT)


def test_alignment_boards_are_full_and_uniform() -> None:
    made = make_alignment("train", 0, "pretrain", 0, 400)
    digits = np.concatenate([board.digits for board in made])
    colours = np.concatenate([board.colours for board in made])
    assert {board.image.shape for board in made} == {(16, 64, 3), (32, 64, 3), (48, 64, 3)}
    assert all(len(board.digits) == board.image.shape[0] // 4 for board in made)
    table = np.zeros((10, len(COLOURS)))
    np.add.at(table, (digits, colours), 1)
    assert table.min() > 0.6 * table.mean()


def test_fingerprint_covers_settings_and_split() -> None:
    config = DataConfig()
    prints = {
        fingerprint(config, "train"),
        fingerprint(config, "held_out"),
        fingerprint(DataConfig(held_out=0.5), "train"),
        fingerprint(DataConfig(augment=False), "train"),
    }
    assert len(prints) == 4
    assert fingerprint(config, "train") in prints


def test_fingerprint_notices_another_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(DataConfig(), "train")
    monkeypatch.setattr(boards, "MULTIPLY_SHARE", 0.9)
    assert fingerprint(DataConfig(), "train") != before


def test_digits_that_neighbours_contradict_are_left_out() -> None:
    ink, labels = boards._digits()
    assert len(ink) == len(labels) == 1797 - 22
