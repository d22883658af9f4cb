"""The CUDA C++ kernels, run thread by thread on the CPU (tests/kernels/emulator) and compared with the definitions.

What the emulator cannot show is speed, and that the chip does what the PTX ISA says.
"""

from __future__ import annotations

import ctypes
import math
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from r4b_kernels import build
from r4b_kernels.group_advantage import BASELINES
from r4b_kernels.group_advantage import reference as advantages
from r4b_kernels.layout import PrefixLayout
from r4b_kernels.prefix_attention import reference as attention

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = build._compiler("cpu")

pytestmark = pytest.mark.skipif(
    COMPILER is None or build.platform.system() != "Linux", reason="no C++ compiler on Linux: nothing to emulate with"
)

AT_ONCE, OLDEST_FIRST, NEWEST_FIRST, IN_RANDOM_ORDER = range(4)  # when the asynchronous engines do their work

RISING, FALLING, ERRATIC = range(3)  # in which order threads run

Run = Callable[..., None]


def _compile(name: str, folder: Path) -> Run:
    target = folder / f"{name}.so"
    flags = (
        "-O2",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-include",
        "emulator.h",
    )
    command = [str(COMPILER), *flags, f"-I{EMULATOR}", f"-I{build.SOURCES}", str(EMULATOR / f"{name}.cpp")]
    subprocess.run([*command, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    function = getattr(library, name)
    function.restype = ctypes.c_char_p

    def run(*arguments: object) -> None:
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
        if failure := function(*pointers):
            raise RuntimeError(failure.decode())

    return run


@pytest.fixture(scope="module")
def build_schedule(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    run = _compile("prefix_schedule", tmp_path_factory.mktemp("emulated"))

    def schedule(layout: PrefixLayout, tokens: int, rows: int = 128, order: int = ERRATIC) -> Tensor:
        segments = layout.num_segments
        tiles = torch.empty(tokens // rows + segments + 2, 8, dtype=torch.int32)
        run(layout.offsets, layout.parent, segments, tokens, rows, tiles, order)
        return tiles

    return schedule


@pytest.fixture(scope="module")
def attend(
    tmp_path_factory: pytest.TempPathFactory, build_schedule: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    run = _compile("prefix_attention", tmp_path_factory.mktemp("emulated"))

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PrefixLayout,
        *,
        scale: float | None = None,
        blocks: int = 2,
        patience: int = IN_RANDOM_ORDER,
        order: int = ERRATIC,
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, dim = q.shape
        tiles = build_schedule(layout, tokens)
        out, lse = torch.full_like(q, math.nan), torch.full((tokens, heads), math.nan)
        sizes = (tokens, heads, k.shape[1], dim, layout.num_segments, tiles.shape[0])
        factor = ctypes.c_float(dim**-0.5 if scale is None else scale)
        run(q, k, v, layout.offsets, tiles, out, lse, *sizes, factor, blocks, patience, order)
        return out, lse

    return forward


def random_layout(seed: int, most: int, segments: int = 12) -> PrefixLayout:
    """Prompts with children, prompts without, empty segments, and children of earlier prompts."""
    choose = random.Random(seed)
    lengths = [choose.choice((0, 1, choose.randrange(most), choose.randrange(most // 8 + 1))) for _ in range(segments)]
    parents: list[int] = []
    for _ in lengths:
        roots = [i for i, owner in enumerate(parents) if owner == -1]
        parents.append(choose.choice([-1, *roots[-2:], *roots[-1:] * 3]))
    return PrefixLayout.from_lengths(lengths, parents)


def expected_tiles(layout: PrefixLayout, tokens: int, rows: int) -> list[tuple[int, ...]]:
    """The tiles in the order of the stream, token by token."""
    bounds, parents = layout.offsets.tolist(), layout.parent.tolist()
    segment_of = [s for s in range(len(parents)) for _ in range(bounds[s], bounds[s + 1])]
    run_of, first = [], 0
    for segment, owner in enumerate(parents):
        first = first if segment > 0 and parents[segment - 1] == owner else segment
        run_of.append(first)
    tiles: list[tuple[int, ...]] = []
    for run in sorted(set(run_of)):
        mine = [token for token, segment in enumerate(segment_of) if run_of[segment] == run]
        far = (bounds[parents[run]], bounds[parents[run] + 1]) if parents[run] >= 0 else (0, 0)
        for at in range(0, len(mine), rows):
            some = mine[at : at + rows]
            own = bounds[segment_of[some[0]]]
            straddles = int(segment_of[some[0]] != segment_of[some[-1]])
            tiles.append((some[0], some[-1] + 1, *far, own, some[-1] + 1, straddles, run))
    padding = range(bounds[-1], tokens, rows)
    return tiles + [(at, min(at + rows, tokens), 0, 0, 0, 0, 4, len(parents)) for at in padding]


@pytest.mark.parametrize("seed", range(8))
def test_schedule(seed: int, build_schedule: Callable[..., Tensor]) -> None:
    rows = (128, 64)[seed % 2]
    layout = random_layout(seed, most=(40, 300, 2000)[seed % 3], segments=(1, 12, 200)[seed % 3])
    tokens = int(layout.offsets[-1]) + (0, 1, 500)[seed % 3]
    tiles = build_schedule(layout, tokens, rows)
    for order in (RISING, FALLING):
        assert torch.equal(tiles, build_schedule(layout, tokens, rows, order))
    wanted = expected_tiles(layout, tokens, rows)
    listed = [tuple(tile) for tile in tiles.tolist()]
    assert sorted(listed[: len(wanted)]) == sorted(wanted)
    assert all(tile == (0,) * 8 for tile in listed[len(wanted) :])
    costs = [tile[3] - tile[2] + tile[5] - tile[4] for tile in listed[: len(wanted)]]
    assert all(later <= earlier + max(costs) / 63 for earlier, later in zip(costs, costs[1:], strict=False))


@pytest.mark.parametrize(
    ("offsets", "parents"),
    [
        ([1, 5], [-1]),
        ([0, 5, 3], [-1, -1]),
        ([0, 500], [-1]),
        ([0, -5, 10], [-1, -1]),
        ([0, 5, 9], [1, -1]),
        ([0, 5, 9], [-1, -2]),
        ([0, 5, 9, 12], [-1, 0, 1]),
        ([3], []),
    ],
    ids=str,
)
def test_malformed_layouts(
    offsets: list[int], parents: list[int], attend: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    # A PrefixLayout checks itself on the CPU, on a GPU it cannot.
    tensors = {"offsets": torch.tensor(offsets, dtype=torch.int32), "parent": torch.tensor(parents, dtype=torch.int32)}
    layout = SimpleNamespace(**tensors, num_segments=len(parents))
    q = torch.randn(150, 1, 64).bfloat16()
    out, lse = attend(q, q, q, layout)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("order", [RISING, FALLING, ERRATIC])
@pytest.mark.parametrize("patience", [AT_ONCE, OLDEST_FIRST, NEWEST_FIRST, IN_RANDOM_ORDER])
def test_attention(dim: int, patience: int, order: int, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """No farther from the truth than twice torch's own bfloat16 result, whatever the order of events."""
    torch.manual_seed(0)
    layout = PrefixLayout.from_lengths([150, 70, 0, 10, 1, 690, 33, 90], [-1, 0, 0, 0, 0, -1, 5, 5])
    live, tokens = int(layout.offsets[-1]), int(layout.offsets[-1]) + 20
    q, k, v = (torch.randn(tokens, heads, dim).bfloat16() for heads in (2, 1, 1))
    for x in (q, k, v):
        x[live:] = math.nan
    out, lse = attend(q, k, v, layout, patience=patience, order=order)
    truth, true_lse = attention.prefix_attention(
        *(x[:live].double() for x in (q, k, v)), layout.offsets, layout.parent, dim**-0.5
    )
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x[None, :live].transpose(1, 2) for x in (q, k, v)), attn_mask=layout.dense_mask(live), enable_gqa=True
    )[0].transpose(0, 1)
    assert (out[:live] - truth).norm() <= 1.5 * (own - truth).norm()
    assert (lse[:live] - true_lse).abs().max() < 2e-6
    assert (out[live:] == 0).all() and (lse[live:] == -math.inf).all()


@pytest.mark.parametrize("seed", range(4))
def test_every_allowed_pair_counts_once(seed: int, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """With scores of 0 the log-sum-exp is the logarithm of the number of keys, and the output their mean."""
    layout = random_layout(seed, most=300)
    tokens = int(layout.offsets[-1])
    q, k = torch.zeros(tokens, 1, 64).bfloat16(), torch.randn(tokens, 1, 64).bfloat16()
    v = torch.nn.functional.one_hot(torch.arange(tokens) % 64, 64)[:, None].bfloat16()
    out, lse = attend(q, k, v, layout, blocks=3)
    mask = layout.dense_mask(tokens).double()
    assert (lse[:, 0] - mask.sum(1).log()).abs().max() < 2e-6
    means = (mask / mask.sum(1, keepdim=True)) @ v[:, 0].double()
    assert (out[:, 0] - means).abs().max() < 4e-3


def test_nan_stays_in_its_run(attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Tiles read keys and values 128 at a time: those of the neighbours must not matter."""
    layout = PrefixLayout.from_lengths([40, 30, 20, 50, 60], [-1, 0, 0, -1, 3])
    bounds = layout.offsets.tolist()
    torch.manual_seed(1)
    q, k, v = (torch.randn(bounds[-1], 1, 64).bfloat16() for _ in range(3))
    clean, clean_lse = attend(q, k, v, layout)
    for x in (q, k, v):
        x[bounds[3] :] = math.nan
    out, lse = attend(q, k, v, layout)
    assert torch.equal(out[: bounds[3]], clean[: bounds[3]]) and torch.equal(lse[: bounds[3]], clean_lse[: bounds[3]])
    assert out[bounds[3] :].isnan().all()


def test_large_scores(attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Scores of thousands, whose exponentials would overflow; a scale of one's own."""
    torch.manual_seed(2)
    layout = PrefixLayout.from_lengths([200, 30], [-1, 0])
    q, k, v = (torch.randn(230, 1, 64).bfloat16() for _ in range(3))
    out, lse = attend(64 * q, k, v, layout, scale=3.0)
    truth, true_lse = attention.prefix_attention(
        64 * q.double(), k.double(), v.double(), layout.offsets, layout.parent, 3.0
    )
    assert (lse - true_lse).abs().max() < 1e-6 * true_lse.abs().max()
    assert (out - truth).abs().max() < 0.02


@pytest.fixture(scope="module")
def group_advantage(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, ...]]:
    run = _compile("group_advantage", tmp_path_factory.mktemp("emulated"))

    def forward(
        rewards: Tensor,
        group_offsets: Tensor,
        mode: Tensor,
        baseline: str,
        std: bool,
        eps: float,
        token_offsets: Tensor | None,
        num_tokens: int,
        shares: int = 1,
        order: int = ERRATIC,
    ) -> tuple[Tensor, ...]:
        rows, wide = rewards.numel(), group_offsets.dtype == torch.int64
        advantage, tokens = torch.full((rows,), -7.0), torch.full((num_tokens,), -7.0)
        live, live_rows = torch.zeros(rows, dtype=torch.bool), torch.full((rows,), -7, dtype=torch.int32)
        num_live = torch.zeros((), dtype=torch.int32)
        sizes = (ctypes.c_int64(x) for x in (rows, group_offsets.numel() - 1, num_tokens))
        token_pointer = ctypes.c_void_p(None) if token_offsets is None else token_offsets
        run(
            *(rewards, rewards.dtype == torch.float64, group_offsets, mode, token_pointer, wide, *sizes),
            *(BASELINES.index(baseline), std, ctypes.c_double(eps)),
            *(advantage, tokens, live, live_rows, num_live, shares, order),
        )
        return advantage, tokens, live, live_rows, num_live

    return forward


def groups(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Groups of 0, 1, 2, 16, 300 and 5 responses, the last all alike; 0 to 100 tokens each."""
    torch.manual_seed(3)
    sizes = torch.tensor([0, 1, 2, 16, 300, 5])
    rows = int(sizes.sum())
    rewards = torch.randn(rows).round(decimals=1).double()
    rewards[-5:] = 0.9
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 100, (rows,)).cumsum(0)])
    return rewards, bounds.to(dtype), torch.randint(0, 2, (rows,)).to(dtype), tokens.to(dtype), int(tokens[-1])


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("std", [True, False])
def test_group_advantage(baseline: str, std: bool, group_advantage: Callable[..., tuple[Tensor, ...]]) -> None:
    dtype = torch.int64 if std else torch.int32
    rewards, bounds, mode, tokens, num_tokens = groups(dtype)
    rewards = rewards if std else rewards.float()
    options = (baseline, std, 1e-6, tokens, num_tokens)
    wanted = advantages.forward(rewards, bounds, mode, *options)
    for order, shares in ((RISING, 1), (FALLING, 3), (ERRATIC, 2)):
        got = group_advantage(rewards, bounds, mode, *options, shares=shares, order=order)
        for ours, theirs in zip(got[:2], wanted[:2], strict=True):
            assert torch.allclose(ours, theirs, rtol=2e-7, atol=0) and torch.equal(ours == 0, theirs == 0)
        for ours, theirs in zip(got[2:], wanted[2:], strict=True):
            assert torch.equal(ours, theirs)


def test_group_advantage_without_tokens(group_advantage: Callable[..., tuple[Tensor, ...]]) -> None:
    rewards, bounds, mode, _, _ = groups(torch.int64)
    advantage, tokens, *_ = group_advantage(rewards, bounds, mode, "union", True, 1e-6, None, 0)
    assert tokens.numel() == 0
    assert torch.allclose(advantage, advantages.forward(rewards, bounds, mode, "union", True, 1e-6, None, 0)[0])


def _spoil(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    rewards, bounds, mode, tokens, num_tokens = groups(torch.int64)
    if name == "offsets fall":
        bounds[3] = 400
    elif name == "offsets too large":
        bounds[-2:] = 10**12
    elif name == "offsets negative":
        bounds[1:4] = -(10**12)
    elif name == "reward not finite":
        rewards[7] = math.inf
    elif name == "mode unknown":
        mode[7] = 2
    elif name == "tokens fall":
        tokens[7] = 10**12
    return rewards, bounds, mode, tokens, num_tokens


@pytest.mark.parametrize(
    "name",
    ["offsets fall", "offsets too large", "offsets negative", "reward not finite", "mode unknown", "tokens fall"],
)
def test_malformed_groups(name: str, group_advantage: Callable[..., tuple[Tensor, ...]]) -> None:
    """Their responses get NaN, everything is written, and the groups that are well-formed keep their values."""
    rewards, bounds, mode, tokens, num_tokens = groups(torch.int64)
    wanted, *_ = advantages.forward(rewards, bounds, mode, "union", True, 1e-6, tokens, num_tokens)
    advantage, token_advantage, live, live_rows, num_live = group_advantage(
        *_spoil(name)[:3], "union", True, 1e-6, *_spoil(name)[3:]
    )
    bad = advantage.isnan()
    assert bad[7] if "offsets too" not in name else bad[-1]
    assert torch.allclose(advantage[~bad], wanted[~bad])
    assert not (advantage == -7).any() and not (token_advantage == -7).any()
    assert torch.equal(live, advantage != 0)
    assert int(num_live) == int(live.sum()) and torch.equal(live_rows[:num_live].long(), live.nonzero()[:, 0])
    assert (live_rows[num_live:] == -1).all()
