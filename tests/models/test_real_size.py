"""The named sizes as they are: parameters and bytes of every rank against `r4b plan`, and one layer of real width.

Nothing of the size of a model is allocated: models, gradient buffers and optimizers are fake tensors, and this process
plays one rank of a job whose other ranks do not exist. Layers of real width are computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs

from r4b_core.config.recipe import OptimConfig, ParallelConfig
from r4b_core.models.decoder import DecoderModel
from r4b_core.models.qwen3_vl.config import SIZES as QWEN_SIZES
from r4b_core.models.qwen3_vl.model import Qwen3VLModel
from r4b_core.models.qwen3_vl.vision import RotaryVisionStream, patch_places, rotary_angles
from r4b_core.models.r4b.config import SIZES as R4B_SIZES
from r4b_core.models.r4b.model import R4BModel
from r4b_core.models.streams import PackedStream
from r4b_core.parallel.learner import Learner
from r4b_core.parallel.runtime import Runtime, start
from r4b_core.plan.memory import layer_bytes, stage_memory, stage_parameters, vision_layer_bytes
from r4b_core.plan.shapes import SHAPES, ModelShape, r4b_shape
from r4b_core.plan.work import Execution, Layout, Work
from r4b_kernels.layout import PrefixLayout
from tests.models.qwen3_vl_oracle import their_config, to_megatron

BUILDERS: dict[str, tuple[ModelShape, Callable[[ParallelConfig, str], DecoderModel]]] = {
    "r4b-4b": (r4b_shape("r4b-4b", R4B_SIZES["4b"]), lambda *how: R4BModel(R4B_SIZES["4b"], *how)),
    **{
        f"qwen3_vl-{size}": (SHAPES[f"qwen3_vl-{size}"], lambda *how, size=size: Qwen3VLModel(QWEN_SIZES[size], *how))
        for size in ("2b", "4b", "8b")
    },
}
PARTS = {
    "vision.merger": "projector",
    "vision.deepstack": "projector",
    "vision": "vision",
    "projector": "projector",
    "image_newline": "projector",
    "embedding": "embedding",
    "decoder.layers": "layers",
    "decoder.final_layernorm": "norm",
    "output_layer": "head",
}
TEXT = Work(micro_batches=1, tokens=1.0, pairs=1.0, loss_rows=1.0)


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[None]:
    """In place of the folder's world of one: this module makes worlds of its own."""
    patches = pytest.MonkeyPatch()
    # What Megatron-Core and r4b ask of gloo and a fake group has no answer to: a timeout; what the other ranks say,
    # which is what this one says; the state of a random generator that nothing is drawn from.
    patches.setattr(FakeProcessGroup, "_set_default_timeout", lambda self, timeout: None, raising=False)
    patches.setattr(dist, "all_gather_object", _everyone_says_the_same)
    unseeded = SimpleNamespace(fork=contextlib.nullcontext)
    patches.setattr("megatron.core.tensor_parallel.layers.get_cuda_rng_tracker", lambda: unseeded)
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    patches.undo()


def _everyone_says_the_same(said: list[Any], mine: Any, group: Any = None) -> None:
    said[:] = [mine] * len(said)


@contextlib.contextmanager
def rank_of(parallel: ParallelConfig, world: int = 1, rank: int = 0) -> Iterator[Runtime]:
    """This process as one rank of ``world``; collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    place = start(parallel, seed=0)
    try:
        yield place
    finally:
        place.stop()
        dist.destroy_process_group()


def part_of(name: str) -> str:
    return PARTS[max((prefix for prefix in PARTS if name == prefix or name.startswith(prefix + ".")), key=len)]


def parts_of(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        found[part_of(name)] = found.get(part_of(name), 0) + parameter.numel()
    return found


def bytes_of(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> int:
    """Of all storages, each once, without those of ``known``."""
    old = {tensor.untyped_storage()._cdata for tensor in known}
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for storage, size in sizes.items() if storage not in old)


def planned(parallel: ParallelConfig, world: int) -> Layout:
    dp = world // (parallel.tp * parallel.pp * parallel.cp)
    return Layout(parallel.tp, parallel.pp, parallel.cp, dp, 1, parallel.sequence_parallel)


LAYOUTS = {
    "one GPU": (1, {}),
    "tp 8 sp": (8, dict(tp=8, sequence_parallel=True)),
    "pp 2 dp 4": (8, dict(pp=2)),
    "tp 2 pp 4 dp 2": (16, dict(tp=2, pp=4)),
    "cp 4 dp 2": (8, dict(cp=4)),
    "tp 2 dp 2, whole optimizer": (4, dict(tp=2, distributed_optimizer=False)),
}


def rank_in(stage: int, parallel: ParallelConfig, world: int) -> int:
    """The last tensor-parallel rank of the first data-parallel ones of a stage."""
    return stage * world // parallel.pp + parallel.tp - 1


@pytest.mark.parametrize("layout", ["one GPU", "tp 8 sp", "tp 2 pp 4 dp 2"])
def test_every_stage_has_the_parameters_that_are_planned(layout: str) -> None:
    world, fields = LAYOUTS[layout]
    parallel = ParallelConfig(**fields)
    for stage in range(parallel.pp):
        with rank_of(parallel, world, rank_in(stage, parallel, world)), FakeTensorMode():
            for name, (shape, build) in BUILDERS.items():
                planned_parts = stage_parameters(shape, planned(parallel, world), stage)
                assert parts_of(build(parallel, "bfloat16")) == planned_parts, f"{name}, stage {stage}"


def test_parts_add_up_to_the_published_count() -> None:
    counted = {name: sum(stage_parameters(shape, Layout(), 0).values()) for name, (shape, _) in BUILDERS.items()}
    assert counted["qwen3_vl-8b"] == 8_767_123_696
    assert counted == {name: shape.parameters for name, (shape, _) in BUILDERS.items()}


@pytest.mark.parametrize(
    ("name", "layout", "frozen", "dtype"),
    [
        ("qwen3_vl-8b", "one GPU", (), "bfloat16"),
        ("qwen3_vl-8b", "tp 2 pp 4 dp 2", (), "bfloat16"),
        ("qwen3_vl-2b", "cp 4 dp 2", ("vision",), "bfloat16"),
        ("r4b-4b", "tp 8 sp", ("vision",), "bfloat16"),
        ("r4b-4b", "tp 2 dp 2, whole optimizer", (), "bfloat16"),
        ("qwen3_vl-2b", "pp 2 dp 4", (), "float32"),
    ],
)
def test_weights_gradients_and_optimizer_take_the_bytes_that_are_planned(
    name: str, layout: str, frozen: tuple[str, ...], dtype: str
) -> None:
    """Megatron-Core's buffers are padded a little: by less than a millionth."""
    shape, build = BUILDERS[name]
    world, fields = LAYOUTS[layout]
    parallel = ParallelConfig(**fields)
    execution = Execution(
        dtype=dtype,  # type: ignore[arg-type]
        sharding="zero1" if parallel.distributed_optimizer else "none",
        train_vision="vision" not in frozen,
        train_projector="vision" not in frozen or name.startswith("r4b"),
    )
    for stage in sorted({0, parallel.pp - 1}):
        with rank_of(parallel, world, rank_in(stage, parallel, world)) as place, FakeTensorMode():
            model = build(parallel, dtype)
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter_name.split(".")[0] not in frozen)
            learner = Learner([model], place, OptimConfig(lr=1e-4), total_steps=10)
            weights = list(model.parameters())
            (ddp,) = learner.chunks
            found = dict(
                weights=bytes_of(weights),
                gradients=bytes_of(buffer.grad_data for buffer in ddp.buffers + ddp.expert_parallel_buffers),
                optimizer=bytes_of(optimizer_tensors(learner), weights),
            )
        plan = stage_memory(shape, planned(parallel, world), execution, TEXT, stage)
        for part, size in found.items():
            assert size == pytest.approx(getattr(plan, part), rel=1e-6), f"{part} of stage {stage}"


def optimizer_tensors(learner: Learner) -> Iterator[Tensor]:
    """Master copies (or the weights themselves) and moments."""
    for part in getattr(learner.optimizer, "chained_optimizers", [learner.optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


THIN = dataclasses.replace(
    QWEN_SIZES["8b"], num_layers=1, vision_num_layers=1, deepstack_layers=(), vocab_size=64, vision_position_side=4
)
GRIDS = torch.tensor([[1, 8, 6], [1, 4, 10]])
TOKENS = 64


def stream_of(tokens: int) -> PackedStream:
    """One segment, its positions those of an image in the middle."""
    image = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T + 10
    positions = torch.arange(tokens).repeat(3, 1)
    positions[:, 10:26] = torch.cat([torch.full((1, 16), 10), image])
    positions[:, 26:] -= 12
    layout = PrefixLayout(torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32))
    return PackedStream(layout=layout, position_ids=positions)


def vision_stream() -> RotaryVisionStream:
    cu_patches = torch.nn.functional.pad(GRIDS.prod(1).cumsum(0), (1, 0)).int()
    angles = rotary_angles(patch_places(GRIDS, 2), 72, THIN.vision_rope_theta)
    return RotaryVisionStream(cu_seqlens=cu_patches, angles=angles)


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Of what autograd keeps for the backward, without ``known``."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return bytes_of(kept, known)


@pytest.mark.parametrize(
    ("fields", "real"),
    [({}, True), ({}, False), (dict(tp=2), False), (dict(tp=8, sequence_parallel=True), False)],
    ids=["one rank", "one rank, fake", "tp 2, fake", "tp 8 sp, fake"],
)
def test_a_decoder_layer_of_8b_saves_what_is_planned(fields: dict[str, Any], real: bool) -> None:
    """Really computed on one rank; in fake tensors, which there must say the same, on one of several."""
    parallel, tokens = ParallelConfig(**fields), 512
    mode = contextlib.nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    with rank_of(parallel, parallel.tp), mode:
        layer = Qwen3VLModel(THIN, parallel, "bfloat16").decoder.layers[0]
        hidden = torch.zeros(tokens // (parallel.tp if parallel.sequence_parallel else 1), 1, THIN.hidden_size)
        hidden, stream = hidden.bfloat16().requires_grad_(), stream_of(tokens)
        saved = saved_bytes(lambda: layer(hidden, None, packed_seq_params=stream), list(layer.parameters()))
    decoder = BUILDERS["qwen3_vl-8b"][0].decoder
    planned_bytes = tokens * layer_bytes(decoder, "none", parallel.tp, parallel.sequence_parallel)
    assert saved == pytest.approx(planned_bytes, rel=0.02)


def test_a_vision_layer_of_8b_saves_what_is_planned() -> None:
    vision = BUILDERS["qwen3_vl-8b"][0].vision
    assert vision is not None
    with rank_of(ParallelConfig()):
        layer = Qwen3VLModel(THIN, ParallelConfig(), "bfloat16").vision.blocks.layers[0]
        patches, stream = int(GRIDS.prod(1).sum()), vision_stream()
        hidden = torch.zeros(patches, 1, vision.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        saved = saved_bytes(lambda: layer(hidden, None, packed_seq_params=stream), layer.parameters())
    planned_bytes = patches * vision_layer_bytes(vision, "none", 1)
    assert saved == pytest.approx(planned_bytes, rel=0.04)


def run(layer: Callable[[Tensor], Tensor], weights: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Output and, through a random linear function of it, every gradient, in float32."""
    hidden = hidden.clone().requires_grad_()
    out = layer(hidden)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad((out * direction).sum(), [hidden, *weights.values()])
    return {"output": out.detach().float(), "input": found[0].float()} | {
        name: gradient.float() for name, gradient in zip(weights, found[1:], strict=True)
    }


def random_layer(layer: nn.Module) -> nn.Module:
    """Weights that bfloat16 holds exactly: matrices of the size that training begins with, norms around one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0, 0.02 if parameter.dim() > 1 else 0.2, generator=generator)
            parameter += float("norm" in name and name.endswith("weight"))
            parameter.copy_(parameter.bfloat16())
    return layer


@pytest.mark.parametrize("kind", ["decoder", "vision"])
def test_a_layer_of_8b_in_bfloat16_is_as_exact_as_transformers(kind: str) -> None:
    """Output and gradients against float32: at most 1.5 times the error of transformers' own bfloat16."""
    config = their_config(THIN)
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        names = dict(theirs.Qwen3VLForConditionalGeneration(config).named_parameters())
    generator = torch.Generator().manual_seed(2)
    if kind == "decoder":
        stream, prefix, mine_prefix = stream_of(TOKENS), "model.language_model.layers.0.", "decoder.layers.0."
        oracle = random_layer(theirs.Qwen3VLTextDecoderLayer(config.text_config, 0))
        hidden = torch.randn(TOKENS, THIN.hidden_size, generator=generator).bfloat16()
        rope = theirs.Qwen3VLTextRotaryEmbedding(config.text_config)

        def call(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x[None], position_embeddings=rope(x[None], stream.position_ids[:, None]))[0]
    else:
        stream, prefix, mine_prefix = vision_stream(), "model.visual.blocks.0.", "vision.blocks.layers.0."
        oracle = random_layer(theirs.Qwen3VLVisionBlock(config.vision_config))
        hidden = torch.randn(int(GRIDS.prod(1).sum()), THIN.vision_hidden_size, generator=generator).bfloat16()
        angles = stream.angles.repeat(1, 2)

        def call(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x, stream.cu_seqlens, (angles.cos(), angles.sin()))

    def renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = to_megatron(names | {prefix + name: value for name, value in values.items()}, THIN)
        return {name.removeprefix(mine_prefix): x for name, x in whole.items() if name.startswith(mine_prefix)}

    def run_theirs(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
        found = run(lambda x: call(layer, x), dict(layer.named_parameters()), x)
        ends = {name: found.pop(name) for name in ("output", "input")}
        return ends | renamed(found)

    exact = run_theirs(oracle, hidden.float())
    half = run_theirs(oracle.bfloat16(), hidden)
    with rank_of(ParallelConfig()):
        model = Qwen3VLModel(THIN, ParallelConfig(), "bfloat16")
        layer = model.get_submodule(mine_prefix.rstrip("."))
        with torch.no_grad():
            for name, weight in renamed(dict(oracle.named_parameters())).items():
                layer.get_parameter(name).copy_(weight)
        mine = run(
            lambda x: layer(x[:, None], None, packed_seq_params=stream)[0].squeeze(1),
            dict(layer.named_parameters()),
            hidden,
        )
    assert mine.keys() == exact.keys()
    for name, truth in exact.items():
        error, allowed = (float((found[name] - truth).norm() / truth.norm()) for found in (mine, half))
        assert error <= 1.5 * allowed, f"{name}: {error:.1e} of its norm, transformers {allowed:.1e}"
