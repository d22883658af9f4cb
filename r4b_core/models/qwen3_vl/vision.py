"""Qwen3-VL's eyes: a ViT for images of any size, the merger of 2 x 2 patches, and DeepStack's mergers.

Shapes: P patches of all images in block order (see `Qwen3VLPrompt`), C values of a patch, Hv vision hidden, D its head
dim, m patches in a block, F = P / m features, H decoder hidden, K DeepStack layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from r4b_core.config.recipe import ParallelConfig
from r4b_core.models.layers import LayerConfig, LayerNorm, vision_spec
from r4b_core.models.qwen3_vl.config import Qwen3VLConfig, vision_settings
from r4b_core.models.qwen3_vl.positions import check_grids
from r4b_core.models.recompute import checkpointed, recomputes_fully, with_gradient
from r4b_core.models.streams import VisionStream
from r4b_core.parallel.device import device
from r4b_kernels import merge_norm


class VisionTower(MegatronModule):
    """Patches [P, C] -> features [F, H] and DeepStack's features [K, F, H]."""

    def __init__(self, config: Qwen3VLConfig, parallel: ParallelConfig, dtype: str) -> None:
        settings = LayerConfig(**vision_settings(config, parallel, dtype))
        super().__init__(config=settings)
        self.shape = config
        options = dict(dtype=settings.params_dtype, device=device())
        frames = config.temporal_patch_size
        self.patch_embed = nn.Linear(frames * config.patch_dim, config.vision_hidden_size, **options)
        self.position = nn.Embedding(config.vision_position_side**2, config.vision_hidden_size, **options)
        self.blocks = TransformerBlock(settings, vision_spec(config.vision_num_layers), post_layer_norm=False)
        self.merger = PatchMerger(config, settings, norm_merged=False)
        self.deepstack = DeepStackMergers(config, settings)

    def forward(self, patches: Tensor, image_grid: Tensor, cu_patches: Tensor) -> tuple[Tensor, Tensor]:
        places = patch_places(image_grid, self.shape.merge_size)
        x = self.embed(patches, places).unsqueeze(1)
        dim = self.config.kv_channels
        stream = RotaryVisionStream(
            cu_seqlens=cu_patches, angles=rotary_angles(places, dim, self.shape.vision_rope_theta)
        )
        fully = recomputes_fully(self, self.config)
        if fully:
            x = with_gradient(x, self.blocks)
        stacked = []
        for number, layer in enumerate(self.blocks.layers):
            run = partial(_run_layer, layer, stream)
            x = checkpointed(run, x) if fully else run(x)
            if number in self.shape.deepstack_layers:
                stacked.append(self.deepstack(len(stacked), x.squeeze(1)))
        features = self.merger(x.squeeze(1))
        return features, torch.stack(stacked) if stacked else features.new_empty(0, *features.shape)

    def embed(self, patches: Tensor, places: PatchPlaces) -> Tensor:
        """[P, Hv]: the patch convolution as one linear, plus the position table at the patches' places.

        The convolution spans several frames; patches with one frame, [P, 3 * patch_size^2], are the same in each.

        Raises:
            ValueError: if patches have neither one frame nor all.
        """
        frames, pixels = self.shape.temporal_patch_size, self.shape.patch_size**2
        patches = patches.to(self.patch_embed.weight.dtype)
        if patches.shape[1] == 3 * pixels:
            patches = patches.view(-1, 3, 1, pixels).expand(-1, 3, frames, pixels).flatten(1)
        elif patches.shape[1] != 3 * frames * pixels:
            raise ValueError(
                f"patches have {patches.shape[1]} values, expected {3 * pixels} (3 x {self.shape.patch_size}^2 of one "
                f"frame) or {frames} times as many: cut the images with patch_size = {self.shape.patch_size}"
            )
        index, weight = bilinear_taps(places, self.shape.vision_position_side)
        position = (self.position(index) * weight.unsqueeze(2)).sum(1)
        return self.patch_embed(patches) + position.to(patches.dtype)


def _run_layer(layer: nn.Module, stream: VisionStream, x: Tensor) -> Tensor:
    return layer(x, None, packed_seq_params=stream)[0]


class PatchMerger(MegatronModule):
    """[P, Hv] -> [F, H]: LayerNorm of the patches or of the merged rows, Linear, GELU, Linear."""

    def __init__(self, config: Qwen3VLConfig, settings: TransformerConfig, norm_merged: bool) -> None:
        super().__init__(config=settings)
        self.merge, self.norm_merged = config.merge_size**2, norm_merged
        width = self.merge * config.vision_hidden_size
        self.norm = LayerNorm(settings, width if norm_merged else config.vision_hidden_size)
        group = parallel_state.get_tensor_model_parallel_group()
        options = dict(config=settings, init_method=settings.init_method, skip_bias_add=False, tp_group=group)
        self.linear_fc1 = ColumnParallelLinear(width, width, bias=True, gather_output=False, **options)
        self.linear_fc2 = RowParallelLinear(width, config.hidden_size, bias=True, input_is_parallel=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        merged = merge_norm(
            x, self.norm.weight, self.norm.bias, merge=self.merge, norm_merged=self.norm_merged, eps=self.norm.eps
        )
        hidden, _ = self.linear_fc1(merged)
        return self.linear_fc2(F.gelu(hidden))[0]


class DeepStackMergers(MegatronModule):
    """One merger for each DeepStack layer, by number (a ModuleList would hide how they are cut from checkpoints)."""

    def __init__(self, config: Qwen3VLConfig, settings: TransformerConfig) -> None:
        super().__init__(config=settings)
        for number in range(len(config.deepstack_layers)):
            self.add_module(str(number), PatchMerger(config, settings, norm_merged=True))

    def forward(self, number: int, x: Tensor) -> Tensor:
        return self.get_submodule(str(number))(x)


@dataclass(frozen=True)
class PatchPlaces:
    """Where each patch lies: int64 [P] row and column in its image, and the image's rows and columns of patches."""

    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor


def patch_places(image_grid: Tensor, merge: int) -> PatchPlaces:
    """Places of the patches of images [I, 3] in block order.

    Raises:
        ValueError: if a grid is a video or does not divide into blocks.
    """
    grids = image_grid.tolist()
    check_grids(grids, merge)
    images = []
    for _, rows, columns in grids:
        raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        blocks = raster.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        images.append(torch.cat([blocks, torch.tensor([[rows, columns]]).expand_as(blocks)], 1))
    return PatchPlaces(*torch.cat(images).to(image_grid.device).unbind(1))


def bilinear_taps(places: PatchPlaces, side: int) -> tuple[Tensor, Tensor]:
    """int64 [P, 4] rows of a side x side table and their float32 [P, 4] weights.

    The corners of an image lie on the corners of the table (``align_corners``), whatever the image's size.
    """
    (low, high, fraction), (left, right, share) = (
        _axis_taps(places.row, places.rows, side),
        _axis_taps(places.column, places.columns, side),
    )
    index = torch.stack([low * side + left, low * side + right, high * side + left, high * side + right], 1)
    weight = [(1 - fraction) * (1 - share), (1 - fraction) * share, fraction * (1 - share), fraction * share]
    return index, torch.stack(weight, 1)


def _axis_taps(place: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the table's entries before and after each place, and its distance from the first of them."""
    exact = place.float() * (side - 1) / (size - 1).clamp(min=1)
    low = exact.floor()
    before = low.long()
    return before, (before + 1).clamp(max=side - 1), exact - low


def rotary_angles(places: PatchPlaces, dim: int, theta: float) -> Tensor:
    """float32 [P, dim / 2]: the angle of each pair (i, i + dim / 2); the first half are rows', the others columns'."""
    count = dim // 4
    frequency = theta ** (-torch.arange(count, device=places.row.device, dtype=torch.float32) / count)
    return torch.cat([places.row.float()[:, None] * frequency, places.column.float()[:, None] * frequency], 1)


@dataclass
class RotaryVisionStream(VisionStream):
    """Images whose queries and keys turn with their patch's place; ``angles`` float32 [P, D / 2]."""

    angles: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        angles = self.angles.unsqueeze(1)
        self._turn = angles.cos(), angles.sin()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # What is turned is new: a view of the joint projection would be all that keeps it for the backward.
        return super().attend(layer, self._rotate(query), self._rotate(key), value.contiguous())

    def _rotate(self, x: Tensor) -> Tensor:
        """[P, heads, D], in float32 and rounded once."""
        cos, sin = self._turn
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
