"""Megatron-Core's own GPTModel with our core attention and head, against its DotProductAttention and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_core.config.recipe import ParallelConfig
from r4b_core.parallel.runtime import start
from r4b_kernels import PrefixLayout, policy_loss_head
from r4b_kernels.adapters import megatron as adapter
from tests.kernels.adapters.megatron_ranks import results
from tests.parallel.launch import run_ranks

pytest.importorskip("megatron.core")

VOCABULARY, LENGTHS, PARENTS = 64, [5, 3, 1, 4, 2, 6], [-1, 0, 0, -1, 3, 3]
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> Iterator[None]:
    place = start(ParallelConfig(), seed=0)
    yield
    place.stop()


def settings(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
    plain = dict(attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, mrope_section=[2, 1, 1])
    return TransformerConfig(**{**sizes, **plain, **changes})


def gpt(ours: bool, tied: bool = False, **changes: Any) -> Any:
    """A GPTModel with the local spec; the same weights every time."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(0)
    spec = get_gpt_layer_local_spec()
    spec = adapter.with_prefix_attention(spec) if ours else spec
    rope = dict(position_embedding_type="mrope", share_embeddings_and_output_weights=tied)
    model = GPTModel(settings(**changes), spec, VOCABULARY, 128, **rope)
    return model.float().train()


def stream(parents: list[int] | None = PARENTS) -> tuple[PrefixLayout, dict[str, Tensor], Tensor, Tensor]:
    """Layout, what Megatron's GPTModel takes, its mask (True hides) and labels."""
    torch.manual_seed(1)
    layout = PrefixLayout.from_lengths(LENGTHS, parents)
    starts = [0 if parent < 0 else LENGTHS[parent] for parent in layout.parent.tolist()]
    counted = [torch.arange(start, start + n) for start, n in zip(starts, LENGTHS, strict=True)]
    inputs = {
        "input_ids": torch.randint(VOCABULARY, (1, TOKENS)),
        "position_ids": torch.cat(counted).expand(3, 1, TOKENS),
    }
    return layout, inputs, ~layout.dense_mask(TOKENS)[None, None], torch.randint(VOCABULARY, (1, TOKENS))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(mine: Any, my_loss: Tensor, theirs: Any, loss: Tensor) -> None:
    torch.testing.assert_close(my_loss, loss, rtol=1e-5, atol=1e-6)
    expected = gradients(theirs, loss)
    for (name, gradient), wanted in zip(gradients(mine, my_loss).items(), expected.values(), strict=True):
        assert bool(wanted.any()), name
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_shared_prompts_equal_dot_product_attention_with_the_mask(recompute: str | None) -> None:
    layout, inputs, mask, labels = stream()
    how = {"full": dict(recompute_method="uniform", recompute_num_layers=1)}.get(str(recompute), {})
    mine, theirs = gpt(True, recompute_granularity=recompute, **how), gpt(False)
    packed = adapter.packed_seq_params(layout)
    my_loss = mine(**inputs, attention_mask=None, labels=labels, packed_seq_params=packed)
    loss = theirs(**inputs, attention_mask=mask, labels=labels)
    weights = torch.randn(loss.shape)
    assert_same(mine, (my_loss * weights).sum(), theirs, (loss * weights).sum())


@pytest.mark.parametrize("padded", [False, True])
def test_thd_sequences(padded: bool) -> None:
    """Megatron's own packed format; the padding of a sequence lies behind it and is read by nobody."""
    from megatron.core.packed_seq_params import PackedSeqParams

    layout, inputs, mask, labels = stream(None)
    offsets, padding = layout.offsets, torch.tensor([1, 0, 0, 2, 0, 3]) * padded
    real = torch.nn.functional.pad((offsets.diff() - padding).cumsum(0), (1, 0)).int()
    packed = PackedSeqParams("thd", real, real, *([offsets, offsets] if padded else []))
    mine, theirs = gpt(True), gpt(False)
    my_loss = mine(**inputs, attention_mask=None, labels=labels, packed_seq_params=packed)
    loss = theirs(**inputs, attention_mask=mask, labels=labels)
    for begin, stop in zip(offsets[:-1].tolist(), (offsets[1:] - padding).tolist(), strict=True):
        torch.testing.assert_close(my_loss[:, begin:stop], loss[:, begin:stop], rtol=1e-5, atol=1e-5)


def test_batches_without_packing() -> None:
    mine, theirs = gpt(True), gpt(False)
    ids, labels = torch.randint(VOCABULARY, (2, 3, 7))
    positions = torch.arange(7).expand(3, 3, 7)
    mask = ~torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    my_loss = mine(ids, positions, None, labels=labels)
    assert_same(mine, my_loss.sum(), theirs, theirs(ids, positions, mask, labels=labels).sum())


@pytest.mark.parametrize("tied", [False, True])
def test_loss_without_logits(tied: bool) -> None:
    layout, inputs, mask, labels = stream()
    mine, theirs = gpt(True, tied), gpt(False, tied)
    adapter.use_linear_logprob(mine)
    packed = adapter.packed_seq_params(layout)
    my_loss = mine(**inputs, attention_mask=None, labels=labels, packed_seq_params=packed)
    loss = theirs(**inputs, attention_mask=mask, labels=labels)
    assert my_loss.shape == loss.shape == (1, TOKENS)
    weights = torch.randn(loss.shape)
    assert_same(mine, (my_loss * weights).sum(), theirs, (loss * weights).sum())
    labels[0, 3] = -100
    assert mine(**inputs, attention_mask=None, labels=labels, packed_seq_params=packed)[0, 3] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_policy_loss_on_the_hidden_states(tied: bool) -> None:
    """A clipped loss on Megatron's logits, in plain torch, is what the head gives without them."""
    layout, inputs, mask, labels = stream()
    mine, theirs = gpt(True, tied), gpt(False, tied)
    adapter.use_linear_logprob(mine)
    hidden = mine(**inputs, attention_mask=None, packed_seq_params=adapter.packed_seq_params(layout))
    assert hidden.shape == (1, TOKENS, 32)
    weight, group = adapter.head(mine)
    logprob = theirs(**inputs, attention_mask=mask)[0].log_softmax(-1).gather(-1, labels[0][:, None])[:, 0]
    old, advantage, share = logprob.detach() + 0.3 * torch.randn(TOKENS), torch.randn(TOKENS), torch.rand(TOKENS)
    ratio = (logprob - old).exp()
    loss = -(share * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()
    my_loss = policy_loss_head(hidden[0], weight, labels[0], old, advantage, share, group=group).loss
    assert_same(mine, my_loss, theirs, loss)


def test_vision_blocks_attend_both_ways() -> None:
    """A layer without a mask over packed images equals DotProductAttention image by image."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = settings(num_query_groups=4)
    mine = adapter.PrefixCoreAttention(config, 1, AttnMaskType.no_mask, "self")
    theirs = DotProductAttention(config, 1, AttnMaskType.no_mask, "self")
    offsets = torch.tensor([0, 6, 7, 12], dtype=torch.int32)
    q, k, v = torch.randn(3, 12, 4, 8)
    got = mine(q, k, v, packed_seq_params=PackedSeqParams("thd", offsets, offsets)).reshape(12, -1)
    images = [slice(*pair) for pair in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    expected = torch.cat([theirs(*(x[image, None] for x in (q, k, v)), None).reshape(-1, 32) for image in images])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(attention_dropout=0.1), "attention_dropout=0.1"),
        (dict(window_size=(4, 0)), r"window_size=\(4, 0\)"),
        (dict(softmax_type="learnable"), "softmax_type=learnable"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gpt(True, **changes)


def test_wrong_calls_are_refused() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    for kind, mask in (("cross", AttnMaskType.causal), ("self", AttnMaskType.padding)):
        with pytest.raises(ValueError, match="attention_type=cross|attn_mask_type=padding"):
            adapter.PrefixCoreAttention(settings(), 1, mask, kind)
    core = adapter.PrefixCoreAttention(settings(), 1, AttnMaskType.causal, "self")
    packed = adapter.packed_seq_params(PrefixLayout.from_lengths([2, 2], [-1, 0]))
    with pytest.raises(ValueError, match="batch size 3"):
        core(*torch.randn(3, 4, 3, 2, 8), packed_seq_params=packed)
    packed.qkv_format = "thd"
    with pytest.raises(ValueError, match="restarts positions"):
        core(*torch.randn(3, 4, 2, 8), packed_seq_params=packed)
    with pytest.raises(ValueError, match="attention_bias"):
        core(*torch.randn(3, 4, 1, 2, 8), attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="bias or feeds multi-token"):
        model = gpt(True)
        model.config.mtp_num_layers = 1
        adapter.use_linear_logprob(model)


def test_two_tensor_parallel_ranks_equal_one(tmp_path: Path) -> None:
    """Heads and vocabulary cut over two ranks, without and with sequence parallelism: losses and whole gradients."""
    run_ranks(Path(__file__).with_name("megatron_ranks.py"), 2, str(tmp_path / "out"), pytest=False)
    expected = results(1, False)
    for sequence_parallel, found in torch.load(tmp_path / "out", weights_only=True).items():
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            assert bool(one.any()), name
            label = f"{name}, sequence_parallel={sequence_parallel}"
            torch.testing.assert_close(found[name], one, rtol=1e-4, atol=2e-6, msg=label)
