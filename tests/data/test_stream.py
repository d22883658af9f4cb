"""The stream of packed sequences: the same for any number of ranks, exact after a stop, full, and hard to hurt."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from r4b_core.config.recipe import DataConfig, ModelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import encode_response
from r4b_core.data.files import RecordFiles
from r4b_core.data.packing import unpack
from r4b_core.data.records import Record, image_size, to_sample, to_table, write_records
from r4b_core.data.stream import Lane, Order, Planner, RecordStream, Step, joined
from r4b_core.models.processor import Processor, processor_of
from tests.models.processing_oracle import photographs
from tests.stages.record_files import SHAPES, make_records, pictures, write_processor

CAPACITY = 600


@pytest.fixture(scope="module", params=["qwen3_vl", "r4b"])
def any_processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return build(request.param, tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return build("qwen3_vl", tmp_path_factory.mktemp("processor"))


def build(family: str, folder: Path) -> Processor:
    model = ModelConfig(family=family, shape=SHAPES[family], processor=str(write_processor(folder, family)))
    return processor_of(model, DataConfig(task="records"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 records in two files of small row groups, four of which cannot be used."""
    records = make_records(61)
    records[4].images = [b"no image"]
    records[11].response = "<think> never closed"
    records[17].question = "long " * CAPACITY
    records[23].images = [pictures()[1][:700]]  # the header is sound, the pixels are cut off
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "a.parquet", records[:40], row_group=7)
    write_records(folder / "b.parquet", records[40:], row_group=7)
    return folder


BAD = {"words/4", "numbers/en/11", "numbers/en/17", "numbers/en/23"}


def files_of(folder: Path) -> RecordFiles:
    return RecordFiles([f"{folder}/*.parquet"], "data.train", ["response"])


def stream(data: Path, processor: Processor, **changes: Any) -> RecordStream:
    arguments: dict[str, Any] = dict(lanes=6, seed=3, lookahead=4, window_rows=20) | changes
    return RecordStream(files_of(data), Planner(processor, CAPACITY), **arguments)


def by_lane(steps: list[list[Step]], ranks: int) -> list[list[tuple[list[int], list[list[int]]]]]:
    """[step][lane]: all tokens and targets, from the steps of each rank."""
    merged = []
    for at in zip(*steps, strict=True):
        lanes: dict[int, Any] = {}
        for rank, step in enumerate(at):
            for index, batch in enumerate(step.batches):
                lanes[rank + index * ranks] = (batch.tokens.tolist(), [targets for _, targets in unpack(batch)])
        merged.append([lanes[lane] for lane in sorted(lanes)])
    return merged


def run(data: Path, processor: Processor, ranks: int, count: int, **changes: Any) -> list[list[Step]]:
    """[rank][step]."""
    taken = []
    for rank in range(ranks):
        with stream(data, processor, ranks=ranks, rank=rank, **changes) as mine:
            taken.append([mine.next() for _ in range(count)])
    return taken


def test_the_data_of_a_step_do_not_depend_on_the_ranks(data: Path, processor: Processor) -> None:
    alone = by_lane(run(data, processor, 1, 6), 1)
    assert len(alone) == 6 and all(len(lanes) == 6 for lanes in alone)
    for ranks in (2, 4, 6):
        assert by_lane(run(data, processor, ranks, 6), ranks) == alone


@pytest.mark.parametrize("before,after", [(1, 1), (2, 3)])
def test_a_resumed_stream_goes_on_exactly_on_any_number_of_ranks(
    data: Path, processor: Processor, before: int, after: int
) -> None:
    whole = by_lane(run(data, processor, 1, 9), 1)
    first = run(data, processor, before, 4)
    state = json.loads(json.dumps(joined(steps[-1].lanes for steps in first)))
    assert list(state) == [str(lane) for lane in range(6)]
    rest = by_lane(run(data, processor, after, 5, state=state), after)
    assert by_lane(first, before) + rest == whole


def test_preparing_ahead_changes_nothing(data: Path, processor: Processor) -> None:
    plain, ahead = (run(data, processor, 1, 5, prefetch=steps, threads=1 + steps)[0] for steps in (0, 3))
    assert by_lane([plain], 1) == by_lane([ahead], 1)
    assert [step.lanes for step in plain] == [step.lanes for step in ahead]
    assert [step.bad for step in plain] == [step.bad for step in ahead]


def test_another_seed_gives_another_order_and_every_epoch_its_own(data: Path, processor: Processor) -> None:
    assert by_lane(run(data, processor, 1, 2), 1) != by_lane(run(data, processor, 1, 2, seed=4), 1)
    order = Order([7, 7, 2, 9], seed=1, window_rows=10)
    epochs = [[tuple(row) for row in rows_of(order, epoch)] for epoch in range(3)]
    expected = {(group, row) for group, rows in enumerate([7, 7, 2, 9]) for row in range(rows)}
    assert all(set(rows) == expected and len(rows) == 25 for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    single = [rows_of(Order([25], seed=1), epoch).tolist() for epoch in range(2)]
    assert single[0] != single[1]  # rows are shuffled anew, too
    again = Order([7, 7, 2, 9], seed=1, window_rows=10)
    assert [tuple(row) for row in rows_of(again, 1)] == epochs[1]


def rows_of(order: Order, epoch: int) -> np.ndarray:
    """Record by record through `locate`, which must agree with the windows."""
    found = []
    for position in range(25):
        window, place = order.locate(epoch, position)
        first, records = order.window(epoch, window)
        assert first + place == position
        found.append(records[place])
    return np.array(found)


def test_an_epoch_holds_every_usable_record_once_and_names_the_others(data: Path, processor: Processor) -> None:
    seen: Counter[str] = Counter()
    bad: dict[str, tuple[str, str]] = {}
    planner = Planner(processor, CAPACITY)
    emit, held = planner.emit, []

    def watched(items: Any) -> tuple[PackedBatch, list[Any]]:
        held.append(items)
        return emit(items)

    planner.emit = watched  # type: ignore[method-assign]
    with RecordStream(files_of(data), planner, lanes=2, seed=0, lookahead=3, window_rows=20) as mine:
        while True:
            step = mine.next()
            bad |= {record.id: (record.reason, record.detail) for record in step.bad}
            if min(lane["epoch"] for lane in step.lanes.values()) == 2:
                break
    for items in held:
        seen.update(item.record.key for item in items if item.epoch == 0)
    usable = {record.key for record in make_records(61)} - BAD
    assert set(bad) == BAD
    # The damaged pixels come to light when the sequence goes out.
    assert {name: count for name, count in seen.items() if name not in BAD} == dict.fromkeys(usable, 1)
    assert bad["words/4"][0] == bad["numbers/en/23"][0] == "image cannot be used"
    assert bad["numbers/en/11"] == ("response cannot be used", "<think> is never closed")
    assert bad["numbers/en/17"][0] == "longer than the packing capacity"
    assert f"exceed packing.capacity={CAPACITY}" in bad["numbers/en/17"][1]


def test_a_lane_without_one_usable_record_is_an_error(tmp_path: Path, processor: Processor) -> None:
    write_records(tmp_path / "a.parquet", [Record(str(i), "s", "?", response="<think>") for i in range(9)])
    with stream(tmp_path, processor, lanes=3, prefetch=1) as mine, pytest.raises(ValueError) as refused:
        mine.next()
    assert "none of the 3 records of one lane can be used" in str(refused.value)
    assert "<think> is never closed" in str(refused.value)


def test_what_is_planned_is_what_goes_out(any_processor: Processor) -> None:
    pieces = photographs()
    for names in (["china"], ["thumbnail"], ["strip"], ["portrait", "square"], []):
        images = [pieces[name][:300, :400] for name in names]
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
            encoded.append(buffer.getvalue())
        marks = "first <image> then <image>?" if len(names) == 2 else "what is shown?"
        record = Record("1", "s", marks, encoded)
        sizes = [image_size(image) for image in encoded]
        assert sizes == [image.shape[:2] for image in images]
        prompt = any_processor.encode_prompt(to_sample(record))
        assert any_processor.prompt_length(marks, sizes) == prompt.num_tokens


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_in_a_header_is_that_of_the_upright_picture(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    Image.new("RGB", (30, 50)).save(buffer, kind, exif=exif)
    record = Record("1", "s", "?", [buffer.getvalue()])
    assert image_size(buffer.getvalue()) == to_sample(record).images[0].shape[:2]


def test_weights_leave_the_empty_block_out(data: Path, processor: Processor) -> None:
    counts = {}
    for mask in (False, True):
        planner = Planner(processor, CAPACITY, mask_empty_think=mask)
        with RecordStream(files_of(data), planner, lanes=2, seed=0, window_rows=20) as mine:
            (batch, *_), step = (taken := mine.next()).batches, taken
        counts[mask] = int((batch.row_weight == 0).sum())
        if mask:
            tags = processor.tokenizer.mode_tokens
            masked = batch.row_target[batch.row_weight == 0].tolist()
            assert masked == [tags.blank_line, tags.think_close] * (len(masked) // 2) and masked
            assert step.thinking < step.records
    assert counts[False] == 0


def test_the_same_records_as_lines_of_json(data: Path, tmp_path: Path, processor: Processor) -> None:
    records = make_records(30)
    write_records(tmp_path / "parquet" / "a.parquet", records, row_group=256)
    lines = []
    for number, record in enumerate(records):
        images: list[Any] = [{"bytes": base64.b64encode(image).decode()} for image in record.images]
        if number == 1:
            (tmp_path / "lines").mkdir()
            (tmp_path / "lines" / "one.jpg").write_bytes(record.images[0])
            images = ["one.jpg"]
        line = {name: getattr(record, name) for name in ("id", "source", "question", "response", "mode", "answer")}
        lines.append(json.dumps(line | {"images": images}))
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(lines) + "\n")
    steps = []
    for pattern in (f"{tmp_path}/parquet/a.parquet", f"{tmp_path}/lines/*.jsonl"):
        files = RecordFiles([pattern], "data.train", ["response"])
        with RecordStream(files, Planner(processor, CAPACITY), lanes=2, seed=0, lookahead=4) as mine:
            steps.append([mine.next() for _ in range(4)])
    assert by_lane([steps[0]], 1) == by_lane([steps[1]], 1)


def test_a_line_that_is_no_record_and_an_image_outside_the_folder(tmp_path: Path, processor: Processor) -> None:
    (tmp_path / "secret.png").write_bytes(pictures()[0])
    folder = tmp_path / "data"
    folder.mkdir()
    good = {"id": "0", "source": "s", "question": "a?", "response": "b", "images": []}
    outside = good | {"id": "9", "images": ["../secret.png"]}
    lines = [json.dumps(good), "{broken", json.dumps(outside), "[1, 2]", json.dumps(good | {"id": "1"})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    files = RecordFiles([str(folder / "a.jsonl")], "data.train")
    with RecordStream(files, Planner(processor, CAPACITY), lanes=1, seed=0, lookahead=3) as mine:
        bad = {record.id: record.reason for record in mine.next().bad}
    assert bad.pop("s/9") == "image cannot be used"
    assert bad == {f"unknown/a.jsonl, row group 0, row {row}": "question cannot be used" for row in (1, 3)}


def test_values_that_are_no_text_are_set_aside(tmp_path: Path, processor: Processor) -> None:
    records = make_records(12)
    table = to_table(records)
    for name, places in (("question", (2, 9)), ("response", (4,))):
        raw = [value.encode() for value in table.column(name).to_pylist()]
        for place in places:
            raw[place] = b"\xff\xfe not UTF-8"
        column = pa.array(raw, pa.binary()).view(pa.string())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, tmp_path / "a.parquet")
    with stream(tmp_path, processor, lanes=1, lookahead=12) as mine:
        bad = {record.id: record.reason for record in mine.next().bad}
    assert bad == {
        records[2].key: "question cannot be used",
        records[9].key: "question cannot be used",
        records[4].key: "response cannot be used",
    }
    lines = [{"id": 1, "source": None, "question": 7, "images": "x", "response": ["a"], "answer": 3, "tries": "4"}]
    lines += [{"id": 2, "source": "s", "question": "a?", "images": None, "response": "b", "mode": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = RecordFiles([str(tmp_path / "b.jsonl")], "data.train")
    with RecordStream(files, Planner(processor, CAPACITY), lanes=1, seed=0, lookahead=2) as mine:
        assert {record.id: record.reason for record in mine.next().bad} == {"unknown/1": "question cannot be used"}


REFUSALS = {
    "nothing": ("absent-*.parquet", r"data\.train: '.*absent-\*\.parquet' matches no file"),
    "a folder": ("", r"matches no file .*; to take all of a folder: .*/\*\.parquet"),
    "another kind": ("notes.txt", "is neither .parquet nor .jsonl: `r4b curate standardize` reads more"),
    "half a file": ("half.parquet", r"half\.parquet cannot be read .*: write it again, or leave it out"),
    "endless brackets": ("deep.jsonl", r"deep\.jsonl cannot be read .*recursion"),
    "other columns": ("other.jsonl", "lacks the columns source, images, response: bring it in with"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_files_that_cannot_be_used_are_refused(case: str, data: Path, tmp_path: Path) -> None:
    name, words = REFUSALS[case]
    (tmp_path / "notes.txt").write_text("x")
    whole = (data / "a.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "deep.jsonl").write_text("[" * 10**5)
    (tmp_path / "other.jsonl").write_text('{"id": "1", "question": "?"}\n')
    with pytest.raises(ValueError, match=words):
        RecordFiles([str(tmp_path / name)], "data.train", ["response"])


def test_the_fingerprint_knows_other_data(data: Path, tmp_path: Path) -> None:
    first = files_of(data).fingerprint
    assert files_of(data).fingerprint == first
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes((data / f"{name}.parquet").read_bytes())
    assert files_of(tmp_path).fingerprint == first  # wherever they lie
    write_records(tmp_path / "b.parquet", make_records(20, start=40), row_group=7)
    assert files_of(tmp_path).fingerprint != first


def test_too_few_records_or_another_number_of_lanes(data: Path, processor: Processor) -> None:
    with pytest.raises(ValueError, match="holds 61 records, fewer than the 62 packed sequences"):
        stream(data, processor, lanes=62)
    with pytest.raises(ValueError, match="do not give each of 8 data-parallel ranks one"):
        stream(data, processor, ranks=8)
    state = run(data, processor, 1, 1)[0][0].lanes
    with pytest.raises(ValueError, match="the checkpoint has the position of 6"):
        stream(data, processor, lanes=4, state=state)


class Lengths:
    """Stands in for a planner: a row is its own length."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def plan(self, row: int, epoch: int, index: int) -> Any:
        from r4b_core.data.stream import Item

        record = SimpleNamespace(key=str(index))
        return Item(epoch, index, record, None, np.zeros(0, np.int32), row)  # type: ignore[arg-type]


def lane(lengths: list[int], capacity: int, lookahead: int) -> Lane:
    return Lane(0, 1, len(lengths), lambda epoch, place: lengths[place], Lengths(capacity), lookahead)  # type: ignore


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200), st.integers(1, 20))
def test_a_lane_drops_nothing_repeats_nothing_and_serves_the_oldest_first(
    lengths: list[int], capacity: int, lookahead: int
) -> None:
    mine = lane(lengths, capacity, lookahead)
    went: set[tuple[int, int]] = set()
    for _ in range(12):
        oldest = mine.hand[0] if mine.hand else None
        items = mine.fill()
        assert oldest is None or items[0] is oldest
        assert 0 < sum(item.length for item in items) <= capacity
        # Nothing at hand would have fitted as well.
        assert all(item.length > capacity - sum(x.length for x in items) for item in mine.hand)
        for item in items:
            assert (item.epoch, item.index) not in went
            went.add((item.epoch, item.index))
    drawn = [(epoch, index) for epoch in range(mine.epoch + 1) for index in range(len(lengths))]
    drawn = drawn[: mine.epoch * len(lengths) + mine.cursor]
    assert sorted(went) == sorted(set(drawn) - {(item.epoch, item.index) for item in mine.hand})
    assert len(mine.hand) == lookahead


def test_sequences_are_full_on_lengths_as_they_are() -> None:
    """MMFineReason's: mean 2,910 tokens, median 2,038, at most 16,316, and some 650 of prompt and image."""
    rng = np.random.default_rng(0)
    lengths = (np.clip(rng.lognormal(np.log(2038), 0.84, 4000), 239, 16316) + rng.integers(300, 1000, 4000)).astype(int)
    assert 3200 < lengths.mean() < 3900
    for capacity, least in ((32768, 0.99), (16384, 0.95)):
        lanes = [lane(lengths[start::4][lengths[start::4] <= capacity].tolist(), capacity, 16) for start in range(4)]
        filled = [sum(item.length for item in mine.fill()) for _ in range(60) for mine in lanes]
        assert np.mean(filled) / capacity > least


def test_memory_stays_flat(data: Path, processor: Processor) -> None:
    with stream(data, processor, lanes=3, lookahead=2) as mine:
        held = [mine.windows.held for _ in range(60) if mine.next()]
    assert max(held) <= mine.windows.limit * 2 * 20
    assert max(held[30:]) <= max(held[:30]) + 20


def test_batches_are_as_wide_as_asked(data: Path, processor: Processor) -> None:
    planner = Planner(processor, CAPACITY, multiple=4, pad_to=CAPACITY)
    with RecordStream(files_of(data), planner, lanes=2, seed=0, window_rows=20) as mine:
        step = mine.next()
    assert [batch.num_tokens for batch in step.batches] == [CAPACITY] * 2
    assert step.tokens == sum(int(batch.layout.offsets[-1]) for batch in step.batches)
    assert step.tokens / (2 * CAPACITY) > 0.7
    for batch in step.batches:
        assert set(batch.tokens[int(batch.layout.offsets[-1]) :].tolist()) <= {processor.tokenizer.pad_token}


def test_a_teachers_columns_come_along(tmp_path: Path, processor: Processor) -> None:
    records = make_records(12)
    lengths = []
    for record in records:
        sample = to_sample(record, images=False)
        lengths.append(len(encode_response(processor.tokenizer, sample)))
    ids = [[[number, 300 + row % 9] for row in range(length)] for number, length in enumerate(lengths)]
    ids[1] = ids[1][:-1]  # another tokenizer's
    logprobs = [[[-0.5, -1.5][: len(slots)] for slots in rows] for rows in ids]
    ids[2][0], logprobs[2][0] = [2], [-0.5]
    table = (
        to_table(records)
        .append_column("teacher_ids", pa.array(ids))
        .append_column(
            "teacher_logprobs", pa.array([None if number == 3 else rows for number, rows in enumerate(logprobs)])
        )
    )
    pq.write_table(table, tmp_path / "a.parquet")
    files = RecordFiles([f"{tmp_path}/a.parquet"], "data.train", ["teacher_ids", "teacher_logprobs"])
    planner = Planner(processor, CAPACITY, teacher_slots=3)
    seen: dict[int, torch.Tensor] = {}
    with RecordStream(files, planner, lanes=1, seed=0, lookahead=12) as mine:
        steps = [mine.next() for _ in range(8)]
    for step in steps:
        (batch,) = step.batches
        slots, said = batch.row_data["teacher_ids"], batch.row_data["teacher_logprobs"]
        assert slots.shape == said.shape == (batch.num_rows, 3) and bool((slots[:, 2] == -1).all())
        for sequence in range(batch.num_sequences):
            rows = slots[batch.row_sequence == sequence]
            seen[int(rows[1, 0])] = rows
            assert rows[1, 0] == -1 or said[batch.row_sequence == sequence][1].tolist() == [-0.5, -1.5, 0.0]
    assert set(seen) == {-1, *range(12)} - {1, 3}
    assert seen[2][0].tolist() == [2, -1, -1] and seen[4][:, :2].tolist() == ids[4]
    bad = [record for step in steps for record in step.bad]
    assert {record.id for record in bad} == {records[1].key}
    assert "the teacher's tokens are not those of this tokenizer" in bad[0].detail


def test_a_decoder_that_is_not_there_is_said_before_anything_is_read(processor: Processor) -> None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="dali"):
            Planner(processor, CAPACITY, decoder="dali")
    else:
        pytest.skip("NVIDIA DALI is installed")
