"""How one parameter of a model here and the tensors of a Hugging Face checkpoint become each other.

A family's table is a list of rules. A parameter of layer i has ``{}`` for i in its name; in Megatron-Core's checkpoints
the layers of a block are one tensor [layers, ...], and :attr:`Rule.layer` is the place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """``join`` makes our tensor of theirs, ``split`` undoes it bit for bit, given the shapes of theirs."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor, Sequence[Shape]], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One parameter.

    Attributes:
        name: as in ``model.named_parameters()`` of an unsplit model.
        theirs: names and shapes of the Hugging Face tensors that it is made of.
        layer, layers: its place among the layers of its block, None and 1 outside of blocks.
    """

    name: str
    theirs: Mapping[str, Shape]
    transform: Transform
    layer: int | None = None
    layers: int = 1

    @property
    def key(self) -> str:
        """Its name in a torch_dist checkpoint, which all layers share."""
        return self.name if self.layer is None else self.name.replace(f".layers.{self.layer}.", ".layers.", 1)

    @property
    def shape(self) -> Shape:
        """The whole parameter's, of one layer."""
        return tuple(self.transform.join([torch.empty(shape, device="meta") for shape in self.theirs.values()]).shape)

    @property
    def stack(self) -> Shape:
        """How many layers share the tensor ``key``, as its first dimension; empty outside of blocks."""
        return () if self.layer is None else (self.layers,)

    @property
    def offset(self) -> list[int]:
        """Where in the tensor ``key`` the parameter begins."""
        return [0 if self.layer is None else self.layer] * len(self.stack) + [0] * len(self.shape)

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.theirs.values())

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        return self.transform.join([read(name) for name in self.theirs])

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.theirs, self.transform.split(whole, list(self.theirs.values())), strict=True))


def _reshaped() -> Transform:
    """One tensor as a matrix (a convolution of patches as the linear that it is), or unchanged: a view."""
    return Transform(
        lambda parts: parts[0] if parts[0].dim() < 3 else parts[0].flatten(1),
        lambda whole, shapes: [whole.reshape(shapes[0])],
    )


def stacked() -> Transform:
    """Tensors under one another: SwiGLU's gate and up projections."""
    return Transform(
        lambda parts: torch.cat(list(parts)),
        lambda whole, shapes: list(whole.split([shape[0] for shape in shapes])),
    )


def by_group(groups: int) -> Transform:
    """q, k, v laid out by key/value group: the group's queries, its key, its value (Megatron-Core's order)."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        parts = whole.unflatten(0, (groups, -1)).split([shape[0] // groups for shape in shapes], 1)
        return [part.flatten(0, 1) for part in parts]

    return Transform(join, split)


def fused_by_group(groups: int) -> Transform:
    """The same where q, k and v come as one tensor, under one another and of equal size."""
    inner = by_group(groups)

    def split(whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        third = (shapes[0][0] // 3, *shapes[0][1:])
        return [torch.cat(inner.split(whole, [third] * 3))]

    return Transform(lambda parts: inner.join(parts[0].chunk(3)), split)


SAME = _reshaped()


def rule(name: str, theirs: str | Mapping[str, Shape], *shape: int, transform: Transform = SAME) -> Rule:
    """A rule for one tensor of theirs (its name and shape), or for several."""
    return Rule(name, {theirs: shape} if isinstance(theirs, str) else theirs, transform)


def per_layer(layers: int, ours: str, theirs: str, rules: Sequence[Rule]) -> list[Rule]:
    """Rules of one layer for each layer; ``ours`` and ``theirs`` are prefixes with ``{}`` for its number."""
    return [
        Rule(
            ours.format(layer) + rule.name,
            {theirs.format(layer) + name: shape for name, shape in rule.theirs.items()},
            rule.transform,
            layer,
            layers,
        )
        for layer in range(layers)
        for rule in rules
    ]


def weight_and_bias(ours: str, theirs: str, rows: int, *columns: int) -> list[Rule]:
    """Rules of a linear layer, a convolution or a LayerNorm (``rows`` alone)."""
    return [rule(f"{ours}.weight", f"{theirs}.weight", rows, *columns), rule(f"{ours}.bias", f"{theirs}.bias", rows)]
