"""Rollout files: what goes in comes out, and a file is whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4b_core.modes import Mode
from r4b_core.rollout.types import Group
from r4b_core.telemetry.rollouts import SCHEMA, read_rollouts, rollouts_path, write_rollouts


def test_round_trip(tmp_path: Path, group: Callable[..., Group]) -> None:
    groups = [group(1, "hard", 0.5), group(2, "easy", 0.5, question="\ud7ff <b>\u2028 </script> \U0001f40e")]
    groups[0].sample.images.append(np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3))
    groups[1].sample.images.clear()
    groups[1].rollouts[0].mode = Mode.AUTO
    groups[1].rollouts[1].reward = float("nan")
    path = rollouts_path(tmp_path, "bpo", 10)
    assert path == tmp_path / "rollouts" / "bpo-step_000010.parquet"
    path.parent.mkdir()
    write_rollouts(path, groups)
    again = read_rollouts(path)
    assert len(again) == 2
    for old, new in zip(groups, again, strict=True):
        assert (new.sample.id, new.sample.question, new.prompt_tokens) == (
            old.sample.id,
            old.sample.question,
            old.prompt_tokens,
        )
        assert len(new.sample.images) == len(old.sample.images)
        for before, after in zip(old.sample.images, new.sample.images, strict=True):
            assert np.array_equal(before, after) and after.dtype == np.uint8
        for before, after in zip(old.rollouts, new.rollouts, strict=True):
            assert (after.tokens, after.mode, after.taken, after.finish) == (
                before.tokens,
                before.mode,
                before.taken,
                before.finish,
            )
            assert (after.text, after.reward_reason, after.seed) == (before.text, before.reward_reason, before.seed)
            assert after.logprobs == pytest.approx(before.logprobs) and after.entropies == pytest.approx(
                before.entropies
            )
            assert (after.advantage, after.thinking_probability) == (before.advantage, before.thinking_probability)
            assert after.reward == before.reward or (np.isnan(after.reward) and np.isnan(before.reward))


def test_images_are_stored_once_per_group(tmp_path: Path, group: Callable[..., Group]) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, [group(1, "hard", 0.5), group(2, "easy", 0.5)])
    table = pq.read_table(path)
    assert table.schema.names == SCHEMA.names
    assert [row is not None for row in table.column("image").to_pylist()] == [i % 8 == 0 for i in range(16)]
    assert read_rollouts(path, images=False)[0].sample.images == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, group: Callable[..., Group]) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, [group(1, "hard", 0.5)])
    before = path.read_bytes()
    broken = group(2, "hard", 0.5)
    broken.rollouts[3].tokens = ["not a token"]  # type: ignore[list-item]
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        write_rollouts(path, [broken])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    text, table = tmp_path / "text.parquet", tmp_path / "table.parquet"
    text.write_text("no")
    pq.write_table(pa.table({"group": [1]}), table)
    for path in (text, table):
        with pytest.raises(ValueError, match=path.name):
            read_rollouts(path)


def test_only_png_is_decoded(tmp_path: Path, group: Callable[..., Group]) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, [group(1, "hard", 0.5)])
    rows = pq.read_table(path).to_pylist()
    rows[0]["image"] = [b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    with pytest.raises(ValueError, match="PNG"):
        read_rollouts(path)
