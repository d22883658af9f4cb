"""The Triton prefix_attention against dense masked attention and against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r4b_kernels import PrefixLayout, _varlen_triton
from r4b_kernels._varlen_triton import Tile, Tiles
from tests.kernels.test_prefix_attention import dense, run, tensors

# Lengths at the borders of tiles of 16 and 32 rows; every path: several tiles a segment, several segments a tile,
# ragged parents, children apart from each other, children of nobody, empty segments everywhere.
LAYOUTS = {
    "edges": ([0, 1, 15, 16, 17, 0, 33, 0], None),
    "group": ([37, 0, 1, 16, 17, 40, 3], [-1, *[0] * 6]),
    "groups": ([16, 9, 20, 0, 5, 33, 18, 2], [-1, 0, 0, -1, 3, -1, 5, 5]),
    "apart": ([20, 6, 17, 8, 19, 4], [-1, -1, 0, 1, 0, 1]),
    "nothing": ([], None),
}
TILES = {
    "wide": Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)),
    "tall": Tiles(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(_varlen_triton, "override", TILES[getattr(request, "param", "wide")])


def check(layout: PrefixLayout, inputs: list[Tensor], tolerance: float, ours: dict[str, Tensor]) -> None:
    total = int(layout.offsets[-1])
    for key, value in dense(layout, [x.detach().double() for x in inputs]).items():
        error = (ours[key][:total].double() - value).abs().max() if total else torch.zeros(())
        assert error <= tolerance * value.abs().max().clamp_min(1.0) if total else True, f"{key}: {error}"
        assert (ours[key][total:] == (float("-inf") if key == "lse" else 0)).all(), f"{key}: tail"


@pytest.mark.parametrize("small_tiles", TILES, indirect=True)
@pytest.mark.parametrize("name", LAYOUTS)
def test_float64_is_the_dense_masked_softmax(name: str, same_in_any_order) -> None:
    layout = PrefixLayout.from_lengths(*LAYOUTS[name])
    inputs = tensors(int(layout.offsets[-1]) + 5, torch.float64, hq=2, hk=1, dim=24)
    check(layout, inputs, 1e-12, same_in_any_order(lambda: run(layout, inputs, "triton")))
