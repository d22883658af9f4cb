"""R-4B's eyes: a SigLIP-style ViT and the LayerNorm-MLP projector.

Shapes: P patches of all images, C values per patch, Hv vision hidden, H decoder hidden, I images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from r4b_core.config.recipe import ParallelConfig
from r4b_core.models.layers import LayerConfig, LayerNorm, vision_spec
from r4b_core.models.r4b.config import R4BConfig, vision_settings
from r4b_core.models.recompute import recomputes_fully, with_gradient
from r4b_core.models.streams import VisionStream
from r4b_core.parallel.device import device


class VisionTower(MegatronModule):
    """Patches [P, C] -> features [P, Hv]. The patch convolution is one linear; positions are a learned table.

    LLaVA-OneVision takes the last layer's output before the tower's final norm, so there is none here.
    """

    def __init__(self, config: R4BConfig, parallel: ParallelConfig, dtype: str) -> None:
        settings = LayerConfig(**vision_settings(config, parallel, dtype))
        super().__init__(config=settings)
        options = dict(dtype=settings.params_dtype, device=device())
        self.grid = config.vision_grid
        self.patch_embed = nn.Linear(config.patch_dim, config.vision_hidden_size, **options)
        self.position = nn.Embedding(self.grid[0] * self.grid[1], config.vision_hidden_size, **options)
        self.blocks = TransformerBlock(settings, vision_spec(config.vision_num_layers), post_layer_norm=False)

    def forward(self, patches: Tensor, image_grid: Tensor, cu_patches: Tensor) -> Tensor:
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype)) + self.position(self.position_index(image_grid))
        if recomputes_fully(self, self.config):
            x = with_gradient(x, self.blocks)
        return self.blocks(x.unsqueeze(1), None, packed_seq_params=VisionStream(cu_seqlens=cu_patches)).squeeze(1)

    def position_index(self, image_grid: Tensor) -> Tensor:
        """int64 [P]: row * columns + column of each patch in the learned table.

        Raises:
            ValueError: if an image has more rows or columns of patches than the table.
        """
        rows, columns = self.grid
        index = []
        for _, height, width in image_grid.tolist():
            if height > rows or width > columns:
                raise ValueError(
                    f"image of {height} x {width} patches: the position table has {rows} x {columns}; "
                    "make the image smaller or cut it into tiles"
                )
            index.append((torch.arange(height)[:, None] * columns + torch.arange(width)).flatten())
        return torch.cat(index).to(image_grid.device)


class Projector(MegatronModule):
    """Features [P, Hv] -> decoder inputs [P, H]: LayerNorm, Linear, GELU, Linear (R-4B appendix B.1)."""

    def __init__(self, config: R4BConfig, parallel: ParallelConfig, dtype: str) -> None:
        settings = LayerConfig(**vision_settings(config, parallel, dtype))
        super().__init__(config=settings)
        options = dict(dtype=settings.params_dtype, device=device())
        self.pre_norm = LayerNorm(settings, config.vision_hidden_size)
        self.linear_1 = nn.Linear(config.vision_hidden_size, config.hidden_size, **options)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size, **options)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(features))))
