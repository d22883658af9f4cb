"""The examples of kernels/README.md, "In your trainer", run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r4b_core.config.recipe import ParallelConfig
from r4b_core.parallel.runtime import start
from r4b_kernels import PrefixLayout

README = (Path(__file__).parents[3] / "kernels" / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## In your trainer")[2].partition("\n## ")[0]
EXAMPLES = dict(re.findall(r"\*\*([\w-]+)\*\*[^`]*?(?:`[^`\n]+`[^`]*?)*```python\n(.*?)```", SECTION, re.DOTALL))


def run(name: str, **names: Any) -> dict[str, Any]:
    """The example's names after it ran, with what it says is the reader's own."""
    space = {"layout": PrefixLayout.from_lengths([4, 3, 2], [-1, 0, 0]), "__name__": "example", **names}
    exec(compile(EXAMPLES[name], f"kernels/README.md: {name}", "exec"), space)
    return space


def test_every_trainer_has_an_example() -> None:
    assert list(EXAMPLES) == ["transformers", "TRL", "verl", "Megatron-Core"]
    assert SECTION.count("```python") == len(EXAMPLES)


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5]])


def test_transformers(positions: torch.Tensor) -> None:
    from tests.kernels.adapters.test_huggingface import qwen3, qwen3_vl

    stream = torch.arange(9)[None]
    after = run("transformers", model=qwen3(torch.float32), vision_model=qwen3_vl(), stream=stream, positions=positions)
    alone = qwen3(torch.float32)(stream[:, [0, 1, 2, 3, 7, 8]]).logits
    torch.testing.assert_close(after["logits"][:, [0, 1, 2, 3, 7, 8]], alone, rtol=1e-5, atol=1e-5)
    assert after["vision_model"].config.vision_config._attn_implementation == "r4b_flash_vision"


def test_trl(tmp_path: Path) -> None:
    from tests.kernels.adapters.test_trl import trainer

    made: dict[str, Any] = {}
    trainer(lambda **arguments: made.update(arguments), tmp_path, max_steps=1)
    names = {"reward": made["reward_funcs"], "config": made["args"], "data": made["train_dataset"]}
    before = made["model"].lm_head.weight.detach().clone()
    run("TRL", model=made["model"], tokenizer=made["processing_class"], **names)
    assert not torch.equal(made["model"].lm_head.weight, before)


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is an oracle, not a dependency")
def test_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.adapters import verl_oracle

    head: Callable[..., Any] = verl_oracle.fused_linear.FusedLinearForPPO.forward
    monkeypatch.setattr(verl_oracle.fused_linear.FusedLinearForPPO, "forward", head)
    run("verl")
    assert verl_oracle.core_algos.get_adv_estimator_fn("r4b_bimode")
    assert verl_oracle.core_algos.get_policy_loss_fn("r4b_clip")
    assert verl_oracle.fused_linear.FusedLinearForPPO.forward is not head


def test_megatron(positions: torch.Tensor) -> None:
    place = start(ParallelConfig(), seed=0)
    try:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        from tests.kernels.adapters.test_megatron import settings

        sizes = {"vocab_size": 64, "max_sequence_length": 128}
        rows = dict(old=torch.full((9,), -4.0), advantage=torch.randn(9), row_weight=torch.full((9,), 1 / 9))
        tokens = dict(stream=torch.arange(9)[None], labels=torch.arange(9)[None] + 1, target=torch.arange(9) + 1)
        after = run(
            "Megatron-Core",
            GPTModel=GPTModel,
            config=settings(),
            layer_spec=get_gpt_layer_local_spec(),
            sizes=sizes,
            positions=positions.expand(3, 1, 9),
            **rows,
            **tokens,
        )
        assert after["losses"].shape == (1, 9) and after["hidden"].shape == (9, 32)
        assert all(bool(parameter.grad.any()) for parameter in after["model"].parameters())
    finally:
        place.stop()
