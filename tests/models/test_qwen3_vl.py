"""The model against transformers' `Qwen3VLForConditionalGeneration` with the same weights: logits and all gradients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3VLForConditionalGeneration

from r4b_core.config.recipe import BpoConfig, ModelConfig, ParallelConfig
from r4b_core.data.batch import PackedBatch
from r4b_core.data.packing import Response, pack_groups_for_rl
from r4b_core.data.schema import Sample
from r4b_core.losses.heads import PolicyHead, sft_head
from r4b_core.models.qwen3_vl.config import SIZES, Qwen3VLConfig, decoder_settings, resolve
from r4b_core.models.qwen3_vl.model import Qwen3VLModel, build_model
from r4b_core.models.qwen3_vl.positions import Qwen3VLPrompt
from r4b_core.models.qwen3_vl.processing import ImageSettings, encode_prompt
from tests.models.build import assert_same_gradients, gradients
from tests.models.processing_oracle import ByteTokenizer, photographs, qwen_image_processor, qwen_processor
from tests.models.qwen3_vl_oracle import SMALL, make_oracle, random_prompt, their_config, their_logits, to_megatron

Items = Sequence[tuple[Qwen3VLPrompt, list[int]]]
# (text before, images, text after) and the lengths of the responses.
LAYOUTS = {
    "text": [(5, [], 1, [9])],
    "one image": [(3, [(4, 6)], 2, [7])],
    "two images": [(2, [(2, 4), (6, 2)], 3, [4])],
    "image first": [(0, [(4, 2)], 1, [3])],
}
LAYOUTS["packed"] = [case for cases in LAYOUTS.values() for case in cases]
LAYOUTS["several responses"] = [(2, [(2, 4), (6, 2)], 3, [4, 1, 6]), (5, [], 1, [2, 3]), (1, [(2, 2)], 1, [1])]


def pair(**shape: object) -> tuple[Qwen3VLModel, Qwen3VLForConditionalGeneration]:
    config = ModelConfig(shape={**SMALL, **shape})
    oracle = make_oracle(resolve(config))
    return copy_weights(build_model(config, ParallelConfig(), seed=0), oracle), oracle


def copy_weights(model: Qwen3VLModel, oracle: Qwen3VLForConditionalGeneration) -> Qwen3VLModel:
    weights = to_megatron(dict(oracle.named_parameters()), model.shape)
    assert weights.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()


def make(
    layout: str, shape: Qwen3VLConfig, share_prefix: bool = False, pad_to: int | None = None
) -> tuple[PackedBatch, Items]:
    generator = torch.Generator().manual_seed(2)
    prompts = [random_prompt(generator, shape, before, grids, after) for before, grids, after, _ in LAYOUTS[layout]]
    groups = [
        [torch.randint(0, 62, (count,), generator=generator).tolist() for count in counts]
        for *_, counts in LAYOUTS[layout]
    ]
    ((batch,),) = pack_groups_for_rl(
        prompts, [[Response(r) for r in g] for g in groups], 256, share_prefix=share_prefix, pad_to=pad_to
    )
    return batch, [(prompt, r) for prompt, group in zip(prompts, groups, strict=True) for r in group]


def compare(model: Qwen3VLModel, oracle: Qwen3VLForConditionalGeneration, batch: PackedBatch, items: Items) -> None:
    """Logits to 1e-5 and, through a random linear function of them, every parameter's gradient to 1e-4."""
    logits = model(batch) @ model.head_weight().T
    want = torch.cat([their_logits(oracle, model.shape, prompt, response) for prompt, response in items])
    assert want.abs().max() > 1
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)

    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weight).sum().backward()
    (want * weight).sum().backward()
    theirs: dict[str, Tensor] = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in oracle.named_parameters()
    }
    got, wanted = gradients(model), to_megatron(theirs, model.shape)
    if not len(batch.patches):
        unseen = [name for name in got if name.startswith("vision")]
        assert unseen and not any(got.pop(name).any() or wanted.pop(name).any() for name in unseen)
    assert_same_gradients(got, wanted, 1e-4)


@pytest.mark.parametrize("layout", ["text", "one image", "two images", "image first"])
def test_one_sample_equals_transformers(layout: str) -> None:
    model, oracle = pair()
    compare(model, oracle, *make(layout, model.shape))


@pytest.mark.parametrize("tie", [True, False])
def test_a_packed_batch_equals_transformers_one_by_one(tie: bool) -> None:
    model, oracle = pair(tie_embeddings=tie)
    batch, items = make("packed", model.shape, pad_to=256)
    assert len(batch.layout.parent) == 4 and len(batch.image_grid) == 4 and batch.num_tokens == 256
    compare(model, oracle, batch, items)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_responses_to_one_prompt_go_on_at_its_position(share_prefix: bool) -> None:
    model, oracle = pair()
    batch, items = make("several responses", model.shape, share_prefix)
    assert bool((batch.layout.parent >= 0).any()) == share_prefix
    compare(model, oracle, batch, items)


def test_photographs_and_a_question_give_the_logits_of_transformers_processor_and_model() -> None:
    tokenizer = ByteTokenizer("<|image_pad|>")
    model, oracle = pair(vocab_size=len(tokenizer.pretrained), patch_size=16)
    oracle.config.image_token_id = tokenizer.image_token
    images = [photographs()[name] for name in ("thumbnail", "strip")]
    limits = 32 * 32, 96 * 64
    sample = Sample("a", "s", images, "Which is <image>, which <image>?", "")
    prompt = encode_prompt(tokenizer, sample, ImageSettings(*limits))
    response = tokenizer.encode("the second")
    ((batch,),) = pack_groups_for_rl([prompt], [[Response(response)]], 256)
    got = model(batch) @ model.head_weight().T

    processor = qwen_processor(tokenizer, qwen_image_processor(*limits))
    text = tokenizer.decode(prompt.tokens.tolist()).replace("<|image_pad|>", "")
    text = text.replace("<|vision_start|>", "<|vision_start|><|image_pad|>") + "the second"
    theirs = processor(images=images, text=[text], return_tensors="pt")
    assert len(batch.image_grid) == 2 and not torch.equal(*batch.image_grid)
    want = oracle(**theirs).logits[0, prompt.num_tokens - 1 : -1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model, _ = pair()
    batch, _ = make("packed", model.shape)
    model.train()
    calls: list[int] = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for granularity, passes in ((None, 1), ("full", 3)):
        config = model.decoder.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = granularity, "uniform", 1
        loss, _, _ = sft_head(model, batch, model(batch))
        loss.backward()
        found.append(gradients(model))
        assert len(calls) == passes, "recomputed layers run once more in the backward pass"
    assert_same_gradients(found[1], found[0], 1e-6)


def test_a_frozen_tower_leaves_the_decoder_its_gradients() -> None:
    model, _ = pair()
    batch, _ = make("packed", model.shape)
    found = []
    for trained in (True, False):
        model.vision.requires_grad_(trained)
        loss, _, _ = sft_head(model, batch, model(batch))
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("vision")})
        assert all((p.grad is not None) == trained for p in model.vision.parameters())
        model.zero_grad()
    assert_same_gradients(found[1], found[0], 1e-6)


def test_bfloat16_is_as_exact_as_transformers() -> None:
    model, oracle = pair()
    batch, items = make("packed", model.shape)
    with torch.no_grad():
        exact = model(batch) @ model.head_weight().T
        model.to(torch.bfloat16)
        mine = (model(batch) @ model.head_weight().T).float()
        oracle.to(torch.bfloat16)
        theirs = torch.cat([their_logits(oracle, model.shape, prompt, response) for prompt, response in items])
    assert (mine - exact).norm() <= 1.2 * (theirs.float() - exact).norm()


@pytest.mark.slow
def test_layers_of_8b_in_bfloat16_are_as_exact_as_transformers() -> None:
    """Layers and mergers at their real width, both ways; DeepStack needs a second decoder layer to be seen."""
    widths = dict(num_layers=2, vision_num_layers=1, deepstack_layers=(0,), vocab_size=64)
    config = ModelConfig(size="8b", shape=widths)
    shape = resolve(config)
    generator = torch.Generator().manual_seed(0)
    prompt, response = random_prompt(generator, shape, 3, [(6, 4)], 2), [1, 2, 3, 4, 5]
    ((batch,),) = pack_groups_for_rl([prompt], [[Response(response)]], 64)
    oracle = make_oracle(shape, std=0.02)
    model = copy_weights(build_model(config, ParallelConfig(), seed=0), oracle)
    with torch.no_grad():
        exact = their_logits(oracle, shape, prompt, response)
        theirs = their_logits(oracle.to(torch.bfloat16), shape, prompt, response)
    del oracle
    model.to(torch.bfloat16)
    mine = model(batch) @ model.head_weight().T
    assert (mine - exact).norm() <= 1.2 * (theirs - exact).norm()
    mine.float().square().mean().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())


def test_losses_run_on_the_model_as_it_is() -> None:
    model, _ = pair()
    batch, _ = make("several responses", model.shape, share_prefix=True)
    batch.row_data = {name: torch.full((batch.num_rows,), value) for name, value in (("old_logprob", -4.0),)}
    batch.row_data |= {"advantage": torch.linspace(-1, 1, batch.num_rows), "share": torch.ones(batch.num_rows)}
    for head in (sft_head, PolicyHead(BpoConfig(kl_coef=0)), PolicyHead(BpoConfig(algorithm="gspo", kl_coef=0))):
        loss, denominator, _ = head(model, batch, model(batch))
        loss.backward()
        assert torch.isfinite(loss) and denominator == batch.num_rows
        assert all(gradient.any() for gradient in gradients(model).values())


def test_row_separators_are_refused() -> None:
    model, _ = pair()
    batch, _ = make("one image", model.shape)
    batch.vision_index[0] = PackedBatch.NEWLINE_INDEX
    with pytest.raises(ValueError, match="index holds -2: entries must be -1 or a row of features"):
        model(batch)


PUBLISHED = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}


@pytest.mark.parametrize("size", PUBLISHED)
def test_named_sizes_have_the_published_parameters(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built without memory: names and shapes are those of transformers' class, their number the checkpoints'."""
    unseeded = SimpleNamespace(fork=contextlib.nullcontext)
    monkeypatch.setattr("megatron.core.tensor_parallel.layers.get_cuda_rng_tracker", lambda: unseeded)
    with FakeTensorMode():
        model = Qwen3VLModel(SIZES[size], ParallelConfig(), "bfloat16")
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(their_config(SIZES[size]))
    wanted = to_megatron(dict(theirs.named_parameters()), SIZES[size])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: weight.shape for name, weight in wanted.items()}
    assert sum(shape.numel() for shape in shapes.values()) == PUBLISHED[size]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"mrope_sections": (4, 3, 2)}, "mrope_sections: [4, 3, 2] must share out head_dim / 2 = 8"),
        ({"vision_hidden_size": 30}, "vision_hidden_size: 30 over vision_num_heads = 3"),
        ({"deepstack_layers": (2, 1)}, "deepstack_layers: [2, 1] must rise and lie in 0 .. 3"),
        ({"deepstack_layers": [3, 4]}, "deepstack_layers: [3, 4] must rise"),
        ({"num_layers": 1}, "deepstack_layers: 2 of them need as many decoder layers, num_layers is 1"),
        ({"depth": 3}, "unknown field(s) depth; there are"),
    ],
)
def test_shapes_that_contradict_themselves_are_refused(shape: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(ModelConfig(shape={**SMALL, **shape}))
    with pytest.raises(ValueError, match="'3b' is not a size of qwen3_vl; there are toy, 2b, 4b, 8b"):
        resolve(ModelConfig(size="3b"))


def test_stages_too_short_for_deepstack_are_refused() -> None:
    with pytest.raises(ValueError, match="parallel.pp = 4: .* 1 of 4 layers, .* first 2, .* take at most 2"):
        decoder_settings(SIZES["toy"], ParallelConfig(pp=4), "float32")
