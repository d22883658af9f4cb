"""TRL's GRPO trainer with the policy head: loss, gradients, metrics and trained weights are those of TRL's own."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r4b_kernels.adapters import trl as adapter
from r4b_kernels.adapters.grpo import LOSS_TYPES, grpo_loss, row_weights
from r4b_kernels.adapters.padded import share_prompts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

PROMPT, COMPLETION, BATCH = 3, 7, 4


class Trainer(adapter.PolicyHead, trl.GRPOTrainer):
    """What a user writes."""


class Sharing(Trainer):
    share_prompts = True


def letters() -> Any:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trainer(kind: type, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))
    model.save_pretrained(folder / "model")  # the reference model is read again from where the model came from
    model.config._name_or_path = str(folder / "model")
    fixed: dict[str, Any] = dict(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, save_strategy="no")
    fixed |= dict(use_bias_correction_kl=False)
    fixed |= dict(max_completion_length=COMPLETION, num_generations=BATCH, per_device_train_batch_size=BATCH)
    fixed |= dict(logging_steps=1, temperature=0.8, disable_tqdm=True, learning_rate=1e-2)
    data = datasets.Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d"}, {"prompt": "e f"}] * 4)
    return kind(
        model=model,
        reward_funcs=lambda completions, **_: [float(text.count("a") - text.count("b")) for text in completions],
        args=trl.GRPOConfig(**{**fixed, **settings}),
        train_dataset=data,
        processing_class=letters(),
    )


def batch(old: bool = True, **more: Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    lengths = torch.tensor([7, 2, 0, 5])
    prompts = torch.randint(3, 29, (2, PROMPT))[[0, 1, 1, 0]]  # two of two completions each
    return {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([0, 1, 1, 0])[:, None]).long(),
        "completion_ids": torch.randint(3, 29, (BATCH, COMPLETION)),
        "completion_mask": (torch.arange(COMPLETION) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.3, -1.2]),
        "old_per_token_logps": torch.randn(BATCH, COMPLETION) * 0.3 - 3.3 if old else None,
        "ref_per_token_logps": torch.randn(BATCH, COMPLETION) * 0.3 - 3.3,
        "num_items_in_batch": torch.tensor(37.0),
        **more,
    }


def loss_and_gradients(owner: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    owner.model.zero_grad()
    owner._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    owner.current_gradient_accumulation_steps = 2
    loss = owner._compute_loss(owner.model, inputs)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in owner.model.named_parameters()}
    return loss.detach(), gradients, {name: value for name, value in owner._metrics["train"].items()}


def assert_same(mine: Any, theirs: Any, inputs: dict[str, Any]) -> None:
    ours, grads, metrics = loss_and_gradients(mine, inputs)
    expected, expected_grads, expected_metrics = loss_and_gradients(theirs, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert any(bool(gradient.any()) for gradient in expected_grads.values())
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", [Trainer, Sharing])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradients_and_metrics_are_those_of_trl(loss_type: str, beta: float, kind: type, tmp_path: Path) -> None:
    settings = dict(loss_type=loss_type, beta=beta, epsilon=0.1, epsilon_high=0.25)
    mine, theirs = (trainer(one, tmp_path, **settings) for one in (kind, trl.GRPOTrainer))
    mine.model.train(), theirs.model.train()
    for inputs in (batch(), batch(old=False), batch(tool_mask=torch.arange(COMPLETION).ne(1).long().expand(BATCH, -1))):
        assert_same(mine, theirs, inputs)
    for owner in (mine, theirs):  # vLLM's correction, as a factor of the policy term alone
        owner.use_vllm = owner.vllm_importance_sampling_correction = True
    assert_same(mine, theirs, batch(importance_sampling_ratio=torch.rand(BATCH, COMPLETION) * 2))


@pytest.mark.parametrize("mine", [Trainer, Sharing])
def test_training_leaves_the_weights_that_trl_leaves(mine: type, tmp_path: Path) -> None:
    """Sampling, rewards, two inner steps and the optimizer are TRL's; generate() works with the head in place."""
    weights, logs = [], []
    for kind in (mine, trl.GRPOTrainer):
        owner = trainer(kind, tmp_path, max_steps=4, num_iterations=2, beta=0.02, seed=3)
        own = owner.model.config._attn_implementation
        owner.train()
        assert owner.model.config._attn_implementation == own
        assert (getattr(owner, "_own_attention", None) == own) == (kind is Sharing)
        weights.append({name: value.detach().clone() for name, value in owner.model.state_dict().items()})
        logs.append([entry for entry in owner.state.log_history if "loss" in entry])
    start = trainer(trl.GRPOTrainer, tmp_path).model.state_dict()
    assert any(not torch.allclose(start[name], value, atol=1e-4) for name, value in weights[1].items())
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"step_time"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("old", [False, True])
def test_padding_may_hold_anything(old: bool) -> None:
    mask = (torch.arange(5) < torch.tensor([5, 2])[:, None]).float()
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    bad = torch.where(mask.bool(), 0.0, torch.nan)
    ids, weights = torch.where(mask.bool(), torch.randint(29, (2, 5)), 10**6), row_weights(mask, "grpo")
    rows = (ids, torch.randn(2, 5) + bad, weights, torch.randn(2, 5) + bad if old else None)
    loss = grpo_loss(hidden, weight, *rows, ref_logprob=torch.randn(2, 5) + bad, kl_coef=0.1).loss
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert bool(gradient.isfinite().all()) and bool(gradient.any())


REFUSED = {
    "loss_type": dict(loss_type="cispo", epsilon_high=2.0),
    "importance_sampling_level": dict(importance_sampling_level="sequence"),
    "delta": dict(delta=2.0),
    "top_entropy_quantile": dict(top_entropy_quantile=0.2),
    "entropy_coef": dict(entropy_coef=0.01),
    "off_policy_mask_threshold": dict(off_policy_mask_threshold=0.5),
    "use_bias_correction_kl": dict(use_bias_correction_kl=True, beta=0.1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_head_cannot_compute_is_refused(name: str, tmp_path: Path) -> None:
    trainer(trl.GRPOTrainer, tmp_path, **REFUSED[name])
    with pytest.raises(ValueError, match=f"{name}=.*use GRPOTrainer alone"):
        trainer(Trainer, tmp_path, **REFUSED[name])


def test_heads_it_cannot_replace_are_refused(tmp_path: Path) -> None:
    model = trainer(trl.GRPOTrainer, tmp_path).model
    capped = copy.deepcopy(model)
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        adapter.add_policy_head(capped)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(29))
    with pytest.raises(ValueError, match="LM head has a bias"):
        adapter.add_policy_head(model)


def test_row_weights_name_what_is_missing() -> None:
    for name in ("dr_grpo", "dapo", "sapo"):
        with pytest.raises(ValueError, match=f"loss_type='{name}'"):
            row_weights(torch.ones(2, 3), name)
    for name in LOSS_TYPES:
        assert not row_weights(torch.zeros(2, 3), name, max_completion_length=3, num_items=1.0).any()


def test_prompts_are_shared_once() -> None:
    inputs = batch()
    packed = share_prompts(*(inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")))
    assert packed.layout.lengths() == [3, 7, 5, 2, 2, 0] and packed.layout.parent.tolist() == [-1, 0, 0, -1, 3, 3]
    assert packed.ids[:3].tolist() == inputs["prompt_ids"][0].tolist()
    for row, start in ((0, 3), (3, 3), (1, 2)):
        real = inputs["completion_mask"][row].bool()
        predicting = packed.rows[row][real]
        assert packed.position_ids[predicting].tolist() == list(range(start - 1, start - 1 + int(real.sum())))
        assert packed.ids[predicting[1:]].tolist() == inputs["completion_ids"][row][real][:-1].tolist()
    for name, value in (("prompt_mask", [1, 1, 0]), ("completion_mask", [0, 1, 1, 1, 1, 1, 1])):
        wrong = {**inputs, name: inputs[name].index_copy(0, torch.tensor([1]), torch.tensor([value]))}
        with pytest.raises(ValueError, match="padded on the left"):
            share_prompts(*(wrong[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        share_prompts(inputs["prompt_ids"], inputs["prompt_mask"] * 0, *list(inputs.values())[2:4])


def test_sharing_refuses_images(tmp_path: Path) -> None:
    owner = trainer(Sharing, tmp_path)
    owner.current_gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match="share_prompts=False"):
        owner._compute_loss(owner.model, batch(pixel_values=torch.zeros(1)))
