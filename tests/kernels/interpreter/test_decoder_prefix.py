"""The prefix theorem through a whole decoder, with the Triton kernel of every op that has one."""

from __future__ import annotations

from r4b_kernels import dispatch
from tests.kernels.test_decoder_prefix import check_bfloat16, check_float64

TRITON = {op for op, backend, reason in dispatch.table("cpu") if backend == "triton" and reason in ("", "chosen")}


def pick(op: str) -> str:
    return "triton" if op in TRITON else "cpu"


def test_a_shared_prompt_changes_neither_loss_nor_gradients() -> None:
    assert {"qk_norm_mrope", "swiglu"} <= TRITON
    check_float64(pick)


def test_bfloat16_is_no_worse_than_torch() -> None:
    check_bfloat16(pick, draws=1)
