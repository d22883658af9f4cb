"""R-4B assembled from transformers' own classes: SigLIP layers, a LayerNorm-MLP projector and Qwen3.

The oracle's weights are the given ones; `to_megatron` lays them out as the Megatron model holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from r4b_core.data.batch import PackedBatch
from r4b_core.data.encoding import EncodedPrompt
from r4b_core.models.r4b.config import R4BConfig


class Oracle(nn.Module):
    def __init__(self, shape: R4BConfig) -> None:
        super().__init__()
        self.shape = shape
        self.language_model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn_hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                rms_norm_eps=shape.norm_eps,
                rope_theta=shape.rope_theta,
                tie_word_embeddings=shape.tie_embeddings,
                attention_bias=False,
                attn_implementation="eager",
            )
        )
        self.vision_tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=shape.vision_hidden_size,
                intermediate_size=shape.vision_ffn_hidden_size,
                num_hidden_layers=shape.vision_num_layers,
                num_attention_heads=shape.vision_num_heads,
                num_channels=3,
                patch_size=shape.patch_size,
                image_size=shape.patch_size,
                hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=1e-6,
                vision_use_head=False,
                attn_implementation="eager",
            )
        )
        rows, columns = shape.vision_grid
        self.position = nn.Embedding(rows * columns, shape.vision_hidden_size)
        self.pre_norm = nn.LayerNorm(shape.vision_hidden_size, eps=1e-6)
        self.linear_1 = nn.Linear(shape.vision_hidden_size, shape.hidden_size)
        self.linear_2 = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(shape.hidden_size))

    def image_rows(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """One image: its projected patches row by row, each row followed by the separator."""
        size = self.shape.patch_size
        embedding = self.vision_tower.embeddings.patch_embedding(patches.view(-1, 3, size, size)).flatten(1)
        table = self.position.weight.view(*self.shape.vision_grid, -1)[:rows, :columns].flatten(0, 1)
        hidden = self.vision_tower.encoder(inputs_embeds=(embedding + table)[None]).last_hidden_state[0]
        features = self.linear_2(nn.functional.gelu(self.linear_1(self.pre_norm(hidden))))
        newline = self.image_newline.expand(rows, 1, -1)
        return torch.cat([features.view(rows, columns, -1), newline], dim=1).flatten(0, 1)

    def embeddings(self, prompt: EncodedPrompt, response: list[int]) -> Tensor:
        """[n, H] of a prompt and its response."""
        tokens = torch.cat([prompt.tokens, torch.tensor(response, dtype=torch.int64)])
        embeddings = self.language_model.get_input_embeddings()(tokens)
        if not len(prompt.image_grid):
            return embeddings
        images, first = [], 0
        for _, rows, columns in prompt.image_grid.tolist():
            images.append(self.image_rows(prompt.patches[first : first + rows * columns], rows, columns))
            first += rows * columns
        place = (prompt.vision_index != PackedBatch.TEXT_INDEX).nonzero().squeeze(1)
        return embeddings.index_copy(0, place, torch.cat(images))

    def forward(self, prompt: EncodedPrompt, response: list[int]) -> Tensor:
        """Logits [len(response), V] of the response's tokens."""
        embeddings = self.embeddings(prompt, response)
        logits = self.language_model(inputs_embeds=embeddings[None]).logits[0]
        return logits[prompt.num_tokens - 1 : -1]


def make_oracle(shape: R4BConfig, seed: int = 0) -> Oracle:
    """Random weights everywhere, norms and biases too."""
    oracle = Oracle(shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return oracle


def to_megatron(values: dict[str, Tensor], shape: R4BConfig) -> dict[str, Tensor]:
    """The oracle's parameters, or their gradients, under the names and in the layout of the Megatron model."""
    lm, vit = "language_model.model.", "vision_tower."
    out = {
        "image_newline": values["image_newline"],
        "vision.patch_embed.weight": values[vit + "embeddings.patch_embedding.weight"].flatten(1),
        "vision.patch_embed.bias": values[vit + "embeddings.patch_embedding.bias"],
        "vision.position.weight": values["position.weight"],
        "embedding.word_embeddings.weight": values[lm + "embed_tokens.weight"],
        "decoder.final_layernorm.weight": values[lm + "norm.weight"],
    }
    if not shape.tie_embeddings:
        out["output_layer.weight"] = values["language_model.lm_head.weight"]
    for kind in ("weight", "bias"):
        out[f"projector.pre_norm.{kind}"] = values[f"pre_norm.{kind}"]
        for linear in ("linear_1", "linear_2"):
            out[f"projector.{linear}.{kind}"] = values[f"{linear}.{kind}"]
    for layer in range(shape.num_layers):
        old, new = f"{lm}layers.{layer}.", f"decoder.layers.{layer}."
        attention = old + "self_attn."
        heads = [values[f"{attention}{name}_proj.weight"] for name in "qkv"]
        out |= {
            new + "input_layernorm.weight": values[old + "input_layernorm.weight"],
            new + "pre_mlp_layernorm.weight": values[old + "post_attention_layernorm.weight"],
            new + "self_attention.linear_qkv.weight": _by_group(heads, shape.num_kv_heads),
            new + "self_attention.linear_proj.weight": values[attention + "o_proj.weight"],
            new + "self_attention.q_layernorm.weight": values[attention + "q_norm.weight"],
            new + "self_attention.k_layernorm.weight": values[attention + "k_norm.weight"],
            new + "mlp.linear_fc1.weight": torch.cat(
                [values[old + "mlp.gate_proj.weight"], values[old + "mlp.up_proj.weight"]]
            ),
            new + "mlp.linear_fc2.weight": values[old + "mlp.down_proj.weight"],
        }
    for layer in range(shape.vision_num_layers):
        old, new = f"{vit}encoder.layers.{layer}.", f"vision.blocks.layers.{layer}."
        for kind in ("weight", "bias"):
            heads = [values[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out |= {
                f"{new}input_layernorm.{kind}": values[f"{old}layer_norm1.{kind}"],
                f"{new}pre_mlp_layernorm.{kind}": values[f"{old}layer_norm2.{kind}"],
                f"{new}self_attention.linear_qkv.{kind}": _by_group(heads, shape.vision_num_heads),
                f"{new}self_attention.linear_proj.{kind}": values[f"{old}self_attn.out_proj.{kind}"],
                f"{new}mlp.linear_fc1.{kind}": values[f"{old}mlp.fc1.{kind}"],
                f"{new}mlp.linear_fc2.{kind}": values[f"{old}mlp.fc2.{kind}"],
            }
    return out


def _by_group(heads: list[Tensor], groups: int) -> Tensor:
    """q, k, v projections -> one, laid out by key/value group: the group's queries, its key, its value."""
    parts = [x.view(groups, -1, *x.shape[1:]) for x in heads]
    return torch.cat(parts, dim=1).flatten(0, 1)
