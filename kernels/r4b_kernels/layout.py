"""PrefixLayout: how a flat stream of tokens is cut into segments that may share a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """S segments over a flat stream of T tokens.

    A token attends causally within its own segment and to every token of its parent segment. The tree has depth one: a
    parent has no parent, and lies before its children. Tokens from ``offsets[-1]`` to T belong to no segment: they are
    padding, their attention output and gradient are zero.

    Attributes:
        offsets: int32 [S+1], non-decreasing, ``offsets[0] == 0``. Segment s is ``[offsets[s], offsets[s+1])``.
        parent: int32 [S], index of the segment whose tokens come before mine, or -1. All -1 is plain varlen packing.

    Raises:
        ValueError: if the tensors are on the CPU and break a rule; says which entry, its value and the rule. The values
            of tensors on a device are not waited for: where they break a rule, attention over them is NaN everywhere,
            and ``check()`` says why.
    """

    offsets: Tensor
    parent: Tensor

    def __post_init__(self) -> None:
        # Tensors under a trace (fake, functional) have no values to look at.
        plain = type(self.offsets) is Tensor and type(self.parent) is Tensor and not torch.compiler.is_compiling()
        if plain and self.offsets.device.type == "cpu" and self.parent.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at every entry, which waits for the device.

        Raises:
            ValueError: if an entry breaks a rule of the layout; names it.
        """
        for name, tensor in (("offsets", self.offsets), ("parent", self.parent)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}: expected int32 with one dimension")
        if self.offsets.numel() != self.parent.numel() + 1:
            raise ValueError(
                f"offsets has {self.offsets.numel()} entries for {self.parent.numel()} of parent: expected one more"
            )
        offsets, parents = self.offsets.tolist(), self.parent.tolist()
        if offsets[0] != 0:
            raise ValueError(f"offsets[0] = {offsets[0]}: the first segment must start at 0")
        for segment, (start, stop) in enumerate(pairwise(offsets)):
            if stop < start:
                raise ValueError(f"offsets[{segment + 1}] = {stop} after {start}: offsets must never decrease")
        _check_parents("parent", parents)

    @staticmethod
    def from_lengths(
        lengths: Sequence[int], parents: Sequence[int] | None = None, device: torch.device | str | None = None
    ) -> PrefixLayout:
        """Build and check a layout from host lists. ``parents=None`` means that no segment has one.

        Raises:
            ValueError: if a length is negative, or a parent is not an earlier segment without a parent of its own.
        """
        parents = [-1] * len(lengths) if parents is None else list(parents)
        if len(parents) != len(lengths):
            raise ValueError(f"parents has {len(parents)} entries for {len(lengths)} lengths: give one per segment")
        offsets = [0]
        for segment, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"lengths[{segment}] = {length}: a segment's length cannot be negative")
            offsets.append(offsets[-1] + length)
        _check_parents("parents", parents)
        return _trusted(
            torch.tensor(offsets, dtype=torch.int32, device=device),
            torch.tensor(parents, dtype=torch.int32, device=device),
        )

    @property
    def num_segments(self) -> int:
        return self.parent.numel()

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def to(self, device: torch.device | str) -> PrefixLayout:
        return _trusted(self.offsets.to(device), self.parent.to(device))

    def lengths(self) -> list[int]:
        """Segment lengths on the host (a device sync on a GPU: for tests and the CPU only)."""
        return self.offsets.diff().tolist()

    def dense_mask(self, num_tokens: int) -> Tensor:
        """bool [T, T], True where the row may attend to the column: the definition, for references and tests."""
        mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device="cpu")
        offsets, parents = self.offsets.tolist(), self.parent.tolist()
        for segment, parent in enumerate(parents):
            start, stop = offsets[segment], offsets[segment + 1]
            mask[start:stop, start:stop] = torch.ones_like(mask[start:stop, start:stop]).tril()
            if parent >= 0:
                mask[start:stop, offsets[parent] : offsets[parent + 1]] = True
        return mask.to(self.device)


def _check_parents(name: str, parents: Sequence[int]) -> None:
    for segment, parent in enumerate(parents):
        if parent != -1 and not (0 <= parent < segment and parents[parent] == -1):
            raise ValueError(
                f"{name}[{segment}] = {parent}: a parent must be an earlier segment that has no parent itself"
            )


def _trusted(offsets: Tensor, parent: Tensor) -> PrefixLayout:
    """A layout whose values were checked before."""
    layout = object.__new__(PrefixLayout)
    object.__setattr__(layout, "offsets", offsets)
    object.__setattr__(layout, "parent", parent)
    return layout
