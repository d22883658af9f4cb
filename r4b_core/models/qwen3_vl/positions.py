"""Qwen3-VL's M-RoPE positions: three numbers (time, height, width) for each token of a sample.

Text counts on by one on all three axes. The tokens of an image share the time at which the image begins and count its
merged rows and columns from there; the text after it goes on at the image's beginning plus its longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from r4b_core.data.encoding import EncodedPrompt


def mrope_positions(is_image: Tensor, image_grid: Tensor, merge: int = 2) -> tuple[Tensor, int]:
    """Positions of one sample, and the one at which the text after it goes on.

    Args:
        is_image: bool [n], the tokens that stand for image features.
        image_grid: int64 [I, 3], (time, height, width) in patches of each image, in the order of the tokens.
        merge: patches along one side of the block that a token stands for.

    Returns:
        (int64 [3, n]: time, height, width; the next free position).

    Raises:
        ValueError: if a grid is a video or does not divide into blocks, or the image tokens are not those of the grids.
    """
    check_grids(image_grid.tolist(), merge)
    rows, columns = (image_grid[:, 1:] // merge).unbind(1)
    place = is_image.nonzero().squeeze(1)
    count = rows * columns
    if int(count.sum()) != len(place):
        raise ValueError(
            f"the sample has {len(place)} image tokens and its {len(image_grid)} grids stand for {int(count.sum())}: "
            "give every image height * width / merge^2 tokens"
        )
    image = torch.arange(len(count), device=place.device).repeat_interleave(count)
    end = count.cumsum(0)
    first, last = place[end - count], place[end - 1]
    if torch.any(last - first != count - 1):
        broken = int((last - first != count - 1).nonzero()[0])
        raise ValueError(f"the tokens of image {broken} do not lie side by side: other tokens are between them")

    advance = (~is_image).to(torch.int64)
    advance[last] = torch.maximum(rows, columns)
    start = advance.cumsum(0) - advance
    within = torch.arange(len(place), device=place.device) - (end - count)[image]
    positions = start.repeat(3, 1)
    positions[:, place] = start[first][image]
    positions[1, place] += within // columns[image]
    positions[2, place] += within % columns[image]
    return positions, int(advance.sum())


def check_grids(grids: Sequence[Sequence[int]], merge: int) -> None:
    """ValueError where a (time, height, width) is no still image or is not made of whole merge x merge blocks."""
    for number, (time, height, width) in enumerate(grids):
        if time != 1:
            raise ValueError(f"image {number} has {time} frames: videos are not supported, give single images")
        if height < 1 or width < 1 or height % merge or width % merge:
            raise ValueError(
                f"image {number} is {height} x {width} patches: both must be positive multiples of {merge}, the side "
                "of a merged block; resize the image"
            )


@dataclass(frozen=True)
class Qwen3VLPrompt(EncodedPrompt):
    """A prompt for Qwen3-VL.

    An image's patches lie block by block, each block's ``merge`` x ``merge`` patches in raster order; a token stands
    for one block, and its ``vision_index`` is the block's first patch.
    """

    merge: int = 2

    @cached_property
    def _positions(self) -> tuple[Tensor, int]:
        return mrope_positions(self.vision_index >= 0, self.image_grid, self.merge)

    @property
    def position_ids(self) -> Tensor:
        return self._positions[0]

    @property
    def next_position(self) -> int:
        return self._positions[1]
