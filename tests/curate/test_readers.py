"""Rows of every format read, and every way in which they may be broken: told with file, row and reason."""

from __future__ import annotations

import base64
import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from r4b_core.curate.stage import Drop
from r4b_core.curate.standardize import rows as rows_module
from r4b_core.curate.standardize.clean import Cleaner
from r4b_core.curate.standardize.formats import KNOWN, detect
from r4b_core.curate.standardize.plan import find_files, plan_inputs, source_name
from r4b_core.curate.standardize.rows import Bad, plan_pieces, read_rows
from r4b_core.curate.standardize.settings import InputSettings, StandardizeSettings
from r4b_core.curate.store import StageError
from r4b_core.data.records import SCHEMA, Record, write_records
from tests.curate.raw import picture

PICTURE = picture(0)
LIMITS = StandardizeSettings(max_text_chars=1000, max_row_bytes=3000, partition_rows=4)


def read(path: Path, settings: StandardizeSettings = LIMITS, **given: Any) -> list[Record | Drop]:
    """Every record and every bad row of a file, in order."""
    cleaner = Cleaner(settings)
    partitions = plan_inputs([InputSettings(path=str(path), **given)], settings)
    return [made for partition in partitions for _, made in cleaner.rows(partition)]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def bad(made: list[Record | Drop]) -> list[tuple[str, int, str]]:
    assert all(drop.quarantined for drop in made if isinstance(drop, Drop))
    return [(drop.file, drop.row, drop.reason) for drop in made if isinstance(drop, Drop)]


MMFR = {
    "question": "<image>\nHow many?",
    "ori_question": "3. How many? (5 points)",
    "original_answer": "So it is \\boxed{7}",
    "answer": None,
    "qwen3vl_235b_thinking_response": "<think>\nseven\n</think>\n<answer>7</answer>",
    "caption": "dots",
    "source": "BMMR",
    "id": 12,
    "pass_rate": 0.25,
    "consistency_analysis": "same",
    "is_consistent": True,
}


def test_mmfinereason_as_the_data_sets_really_are(tmp_path: Path) -> None:
    """Written by `datasets` itself, images and all."""
    features = Features(
        {
            **{name: Value("string") for name in MMFR},
            "id": Value("int64"),
            "pass_rate": Value("float64"),
            "is_consistent": Value("bool"),
            "image": Image(),
        }
    )
    row = {**MMFR, "image": {"bytes": PICTURE, "path": "a.png"}}
    Dataset.from_list([row, {**row, "id": 13, "is_consistent": None}], features).to_parquet(str(tmp_path / "x.parquet"))
    first, second = read(tmp_path / "x.parquet")
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.id, first.source, first.images) == ("12", "BMMR", [PICTURE])
    assert (first.tries, first.right, first.verdict) == (4, 1, "right")
    assert (first.answer, first.original_answer) == (None, "So it is \\boxed{7}")
    assert first.original_question == "3. How many? (5 points)"
    assert first.caption == "dots" and first.response == MMFR["qwen3vl_235b_thinking_response"]
    assert first.provenance == {"file": "x.parquet", "row": "0", "consistency_analysis": "same"}
    assert second.verdict is None


def test_mmfinereason_by_the_names_of_paper_and_code(tmp_path: Path) -> None:
    row = {
        "question": "How many?",
        "original_question": "How many (1)?",
        "answer": "7",
        "qwen3vl_235b_instruct_caption": "dots",
        "qwen3vl_4b_pass_rate": 1,
        "id": 1,
    }
    (record,) = read(jsonl(tmp_path / "BMMR.jsonl", row))
    assert isinstance(record, Record)
    assert (record.original_question, record.caption, record.tries, record.right) == ("How many (1)?", "dots", 4, 4)
    assert record.source == "BMMR"


@pytest.mark.parametrize("rate", [0.3, 1.25, -0.25])
def test_a_pass_rate_that_four_tries_cannot_give_is_refused(tmp_path: Path, rate: float) -> None:
    made = read(jsonl(tmp_path / "a.jsonl", {**MMFR, "pass_rate": rate}))
    assert bad(made) == [("a.jsonl", 0, "wrong value")]


def test_finevision_gives_a_record_per_turn(tmp_path: Path) -> None:
    turns = [{"user": "What?", "assistant": "A dot."}, {"user": "Where?", "assistant": "<think>\nhm\n</think>left"}]
    table = pa.table(
        {"images": [[{"bytes": PICTURE, "path": None}]], "texts": [turns], "source": ["ai2d"], "rating": [[5]]}
    )
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    first, second = read(tmp_path / "train-00000-of-00001.parquet")
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.id, second.id) == ("train-00000-of-00001-0-0", "train-00000-of-00001-0-1")
    assert (first.source, first.question, first.original_answer, first.response) == ("ai2d", "What?", "A dot.", None)
    assert (second.original_answer, second.response) == (None, "<think>\nhm\n</think>left")
    assert first.images == second.images == [PICTURE]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava_with_its_image_folder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURE)
    row = {
        "id": "q",
        "image": "a.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A dot."},
            {"from": "human", "value": "unanswered"},
        ],
    }
    openai = {"id": 2, "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]}
    path = tmp_path / f"llava_mix.{suffix}"
    path.write_text(
        json.dumps([row, openai], indent=1) if suffix == "json" else f"{json.dumps(row)}\n\n{json.dumps(openai)}"
    )
    first, second = read(path, images=str(tmp_path / "pictures"))
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.id, first.source, first.question, first.images) == ("q", "llava_mix", "<image>\nWhat?", [PICTURE])
    assert (second.id, second.question, second.original_answer, second.images) == ("2", "Hi?", "Ho.", [])
    assert second.provenance["row"] == "1"


def test_plain_rows_take_their_pictures_from_files_and_data_uris(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    uri = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    made = read(
        jsonl(
            tmp_path / "plain.jsonl",
            {"problem": "Which?", "solution": "Long story.", "images": ["a.png", uri], "needs_reasoning": True},
            {"query": "How many?", "label": 5, "question_id": 9},
        ),
        StandardizeSettings(),
    )
    first, second = made
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.question, first.answer, first.original_answer) == ("Which?", None, "Long story.")
    assert first.images == [PICTURE, PICTURE] and first.provenance["needs_reasoning"] == "yes"
    assert (second.id, second.answer) == ("9", "5")


def test_our_own_records_come_back_whole(tmp_path: Path) -> None:
    record = Record("1", "s", "Q?", [PICTURE], "a", "oq", "oa", "c", "r", "stop", 3, "e", "right", "v", 8, 2, "direct")
    record.provenance = {"teacher": "t", "file": "x", "row": "7"}
    write_records(tmp_path / "part-0.parquet", [record])
    (again,) = read(tmp_path / "part-0.parquet")
    assert isinstance(again, Record)
    assert again.provenance == {"teacher": "t", "file": "part-0.parquet", "row": "0"}
    again.provenance = record.provenance
    assert again == record


HOSTILE: list[tuple[str, Any]] = [
    ("not JSON", b"{broken\n"),
    ("not JSON", b"[1, 2]\n"),
    ("not JSON", b'{"question": ' + b"[" * 2900 + b"\n"),
    ("invalid UTF-8", b'{"question": "\xff\xfe?", "answer": "1"}\n'),
    ("invalid UTF-8", {"question": "a \ud800 b?"}),
    ("row too large", {"question": "x" * 4000}),
    ("field too large", {"question": "x" * 2000}),
    ("missing column", {"answer": "1"}),
    ("null question", {"question": None}),
    ("null question", {"question": ""}),
    ("wrong type", {"question": ["a", "list"]}),
    ("wrong type", {"question": {"text": "a"}}),
    ("wrong type", {"question": True}),
    ("wrong type", {"question": "Q?", "id": 1.5}),
    ("wrong type", {"question": "Q?", "answer": {"x": 1}}),
    ("wrong type", {"question": "Q?", "image": 7}),
    ("missing image", {"question": "Q?", "image": "not-there.png"}),
    ("missing image", {"question": "Q?", "image": "nul\0.png"}),
    ("image path outside its folder", {"question": "Q?", "image": "../secret.png"}),
    ("image path outside its folder", {"question": "Q?", "image": "/etc/passwd"}),
    ("image path outside its folder", {"question": "Q?", "image": "link.png"}),
    ("broken image", {"question": "Q?", "image": "data:image/png;base64,!!!"}),
    ("images do not match", {"question": "<image> and <image>?"}),
]


def test_every_bad_row_is_told_and_the_good_ones_come_through(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    rows: list[Any] = [{"question": "good?", "answer": "1"}]
    for _, row in HOSTILE:
        rows += [row, {"question": "good?", "extra": [1], "answer": None}]
    made = read(jsonl(folder / "rows.jsonl", *rows))
    assert len(made) == len(rows)
    assert bad(made) == [("rows.jsonl", 1 + 2 * i, reason) for i, (reason, _) in enumerate(HOSTILE)]
    assert all(isinstance(record, Record) for record in made[::2])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"images": [], "texts": "no list"}, "wrong type"),
        ({"images": [], "texts": [{"user": None, "assistant": "A"}]}, "null question"),
        ({"images": [], "texts": []}, "no question"),
        ({"conversations": [{"from": "nobody", "value": "Q?"}]}, "wrong value"),
        ({"conversations": "{not json"}, "wrong type"),
        ({"conversations": [{"from": "human", "value": "Q?"}]}, "no question"),
    ],
)
def test_broken_dialogues(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    assert bad(read(jsonl(tmp_path / "d.jsonl", columns))) == [("d.jsonl", 0, reason)]


def test_a_parquet_file_cut_in_half_is_one_entry(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["Q?"] * 100}), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert bad(read(path)) == [("x.parquet", 0, "unreadable file")]
    path.write_bytes(b"")
    assert bad(read(path)) == [("x.parquet", 0, "unreadable file")]


def test_of_a_damaged_parquet_file_the_sound_row_groups_are_used(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"question": [f"Question number {i}?" for i in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    at = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[at + 10 : at + 60] = b"\xff" * 50
    path.write_bytes(raw)
    made = read(path)
    assert bad(made) == [("x.parquet", row, "unreadable row group") for row in range(10, 20)]
    assert [record.provenance["row"] for record in made if isinstance(record, Record)] == [
        str(row) for row in (*range(10), *range(20, 30))
    ]


def test_invalid_utf8_in_parquet_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"good?", b"bad \xff", b"fine?"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"question": text}), tmp_path / "x.parquet")
    assert bad(read(tmp_path / "x.parquet")) == [("x.parquet", 1, "invalid UTF-8")]


def test_pieces_of_parquet_files_are_whole_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": [str(i) for i in range(25)]}), path, row_group_size=5)
    pieces = plan_pieces(path, 12, 10**6)
    assert [(piece.start, piece.rows, piece.offset, piece.groups) for piece in pieces] == [
        *((0, 10, 0, 2), (10, 10, 2, 2), (20, 5, 4, 1)),
    ]
    rows = [row for piece in pieces for row in read_rows(path, piece, KNOWN, 10**6)]
    assert rows == [(i, {"question": str(i)}) for i in range(25)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[]{}, ', max_size=8) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=12),
    st.sampled_from([None, 1]),
    st.sampled_from([1, 2, 3, 7, 1 << 20]),
    st.sampled_from(["json", "jsonl"]),
    st.sampled_from([b"", codecs.BOM_UTF8]),
    st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_pieces_give_the_rows_that_json_gives(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[dict[str, Any]],
    indent: int | None,
    chunk: int,
    suffix: str,
    mark: bytes,
    size: int,
) -> None:
    """Whatever the elements hold, wherever chunks end, and whether an editor put its mark before them."""
    path = tmp_path_factory.mktemp("json") / f"x.{suffix}"
    lines = "".join(json.dumps(value) + "\n" for value in values)
    path.write_bytes(mark + (json.dumps(values, indent=indent) if suffix == "json" else lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "CHUNK", chunk)
        pieces = plan_pieces(path, size, 10**6)
        assert all(piece.rows <= size for piece in pieces)
        rows = [row for piece in pieces for row in read_rows(path, piece, KNOWN, 10**6)]
    assert rows == list(enumerate(values))


def test_a_broken_element_of_a_json_array_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        '[{"question": "1"}, {"question": }, {"question": "' + "x" * 4000 + '"}, 5,\n {"question": "2"}, {"que'
    )
    (piece,) = plan_pieces(path, 100, 3000)
    rows = [
        columns.reason if isinstance(columns, Bad) else columns for _, columns in read_rows(path, piece, KNOWN, 3000)
    ]
    assert rows == [{"question": "1"}, "not JSON", "row too large", "not JSON", {"question": "2"}, "not JSON"]


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["id", "image", "conversations"], "llava"),
        (["images", "texts", "source", "formatting_ratings"], "finevision"),
        (["question", "answer", "image"], "jsonl"),
        (["question", "is_consistent"], "mmfinereason"),
        (SCHEMA.names, "records"),
        (["a", "b"], None),
    ],
)
def test_formats_are_told_by_columns(columns: list[str], form: str | None) -> None:
    assert detect(columns) == form


def test_inputs_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no .parquet, .jsonl, .json file there"):
        find_files(str(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(StageError, match=r"a\.csv: only \.parquet, \.jsonl, \.json are read"):
        find_files(str(tmp_path / "*.csv"))
    jsonl(tmp_path / "a.jsonl", {"x": 1, "y": 2})
    with pytest.raises(StageError, match="the columns x, y tell of no format .* name it with format"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(StageError, match="inputs: there are none"):
        plan_inputs([], LIMITS)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/BMMR/train-00000-of-00018.parquet", "BMMR"),
        ("data/llava_665k.json", "llava_665k"),
        ("raven/data/0001.parquet", "raven"),
        ("sft/part-3.parquet", "sft"),
    ],
)
def test_sources_are_named_after_files_or_their_folders(path: str, name: str) -> None:
    assert source_name(Path(path)) == name
