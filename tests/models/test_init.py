"""Parameters: their names and number, and initial values that do not depend on how they are cut over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from r4b_core.config.recipe import ModelConfig, ParallelConfig
from r4b_core.models import init
from r4b_core.models.r4b.config import resolve
from r4b_core.models.r4b.model import R4BModel, build_model
from r4b_core.parallel.names import global_name


def toy(seed: int = 0, **shape: object) -> R4BModel:
    return build_model(ModelConfig(shape=shape), ParallelConfig(), seed)


def test_toy_parameters() -> None:
    linear = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    norms = {"input_layernorm", "pre_mlp_layernorm"}
    qk_norms = {"self_attention.q_layernorm", "self_attention.k_layernorm"}
    modules = {"vision.patch_embed", "projector.pre_norm", "projector.linear_1", "projector.linear_2"}
    modules |= {f"vision.blocks.layers.0.{name}" for name in linear | norms}
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names |= {f"decoder.layers.{i}.{name}.weight" for i in (0, 1) for name in linear | norms | qk_norms}
    names |= {"image_newline", "vision.position.weight", "embedding.word_embeddings.weight"}
    names |= {"decoder.final_layernorm.weight"}
    sizes = {name: parameter.numel() for name, parameter in toy().named_parameters()}
    assert sizes.keys() == names

    h, f, qkv, v, vf = 128, 256, (4 + 2 * 2) * 32, 64, 256
    decoder = 2 * (2 * h + qkv * h + 2 * 32 + h * h + 3 * f * h) + h
    vision = 768 * v + v + 12 * v + 4 * v + (3 * v * v + 3 * v) + (v * v + v) + (vf * v + vf) + (v * vf + v)
    projector = 2 * v + (v * h + h) + (h * h + h)
    assert sum(sizes.values()) == 64 * h + decoder + vision + projector + h == 428_928
    assert toy(tie_embeddings=False).state_dict()["output_layer.weight"].shape == (64, h)


def test_initial_values_depend_on_the_seed_alone() -> None:
    first, again, other = toy(3), toy(3), toy(4)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.dim() == 2 or name == "image_newline":
            assert not torch.equal(a, c), name


def test_initial_values_by_kind() -> None:
    std, layers = 0.08, 2
    for name, value in toy().named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            writes_to_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            want = std / math.sqrt(2 * layers) if writes_to_residual else std
            # The standard deviation of n draws is within 5 / sqrt(2n) of the true one.
            assert abs(float(value.std()) / want - 1) < 5 / math.sqrt(2 * value.numel()), name


def test_no_two_parameters_are_drawn_alike() -> None:
    drawn: dict[float, str] = {}
    for name, value in toy().named_parameters():
        if value.dim() == 2:
            key = float(value.flatten()[0]) / (0.5 if name.endswith(("proj.weight", "fc2.weight")) else 1.0)
            assert key not in drawn, f"{name} begins like {drawn[key]}"
            drawn[key] = name


def test_global_name_counts_layers_over_the_stages() -> None:
    # A second stage of three layers that begins with the model's layer 3; layer 1 is a prefix of layer 10.
    offsets = {f"decoder.layers.{i}": i + 3 for i in range(12)} | {"vision.blocks.layers.0": 0}
    for local, whole in {
        "decoder.layers.0.mlp.linear_fc1.weight": "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.1.input_layernorm.weight": "decoder.layers.4.input_layernorm.weight",
        "decoder.layers.11.mlp.linear_fc2.weight": "decoder.layers.14.mlp.linear_fc2.weight",
        "vision.blocks.layers.0.mlp.linear_fc1.bias": "vision.blocks.layers.0.mlp.linear_fc1.bias",
        "decoder.final_layernorm.weight": "decoder.final_layernorm.weight",
        "image_newline": "image_newline",
    }.items():
        assert global_name(local, offsets) == whole


def fill(shape: tuple[int, ...], name: str, **attributes: object) -> Tensor:
    parameter = nn.Parameter(torch.empty(shape))
    for key, value in attributes.items():
        setattr(parameter, key, value)
    return init._initial_value(name, parameter, 0, 0.1, 2)


@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (0, 2), (1, 1)])
def test_shards_of_all_ranks_make_the_whole(monkeypatch: pytest.MonkeyPatch, dim: int, stride: int) -> None:
    def shards(ranks: int) -> list[Tensor]:
        shape = [8, 12]
        shape[dim] //= ranks
        monkeypatch.setattr(init.parallel_state, "get_tensor_model_parallel_world_size", lambda: ranks)
        made = []
        for rank in range(ranks):
            monkeypatch.setattr(init.parallel_state, "get_tensor_model_parallel_rank", lambda r=rank: r)
            cut = dict(tensor_model_parallel=True, partition_dim=dim, partition_stride=stride)
            made.append(fill(tuple(shape), "mlp.linear_fc1.weight", **cut))
            assert made[-1].shape == tuple(shape)
        return made

    (whole,) = shards(1)
    for ranks in (2, 4):
        # Gate and up (stride 2) are each cut over the ranks: a rank holds its part of both.
        parts = [shard.chunk(stride, dim) for shard in shards(ranks)]
        joined = torch.cat([torch.cat([part[block] for part in parts], dim) for block in range(stride)], dim)
        assert torch.equal(joined, whole)


def test_megatron_tells_how_parameters_are_cut() -> None:
    cut = {
        name.split("layers.0.")[-1]: (parameter.partition_dim, parameter.partition_stride)
        for name, parameter in toy().named_parameters()
        if getattr(parameter, "tensor_model_parallel", False) and "layers.1" not in name and "vision" not in name
    }
    assert cut == {
        "embedding.word_embeddings.weight": (0, 1),
        "self_attention.linear_qkv.weight": (0, 1),
        "self_attention.linear_proj.weight": (1, 1),
        "mlp.linear_fc1.weight": (0, 2),
        "mlp.linear_fc2.weight": (1, 1),
    }


def test_a_tied_head_on_another_stage_gets_the_embedding_table() -> None:
    def head(tied: bool) -> Tensor:
        stage = nn.Module()
        stage.output_layer = nn.Linear(8, 64, bias=False)
        stage.output_layer.weight.shared_embedding = tied
        init.init_weights(stage, 0, 0.1, 2)
        return stage.output_layer.weight

    table = fill((64, 8), "embedding.word_embeddings.weight")
    assert torch.equal(head(tied=True), table)
    assert not torch.equal(head(tied=False), table)


def test_unknown_sizes_and_fields_are_named() -> None:
    with pytest.raises(ValueError, match="model.size: 'huge' is not a size of r4b; there are toy, 4b"):
        resolve(ModelConfig(size="huge"))
    with pytest.raises(ValueError, match="unknown field.*hidden; there are .*hidden_size"):
        resolve(ModelConfig(shape={"hidden": 3}))
