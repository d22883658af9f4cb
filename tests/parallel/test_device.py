from __future__ import annotations

import sys
import types

import pytest
import torch

from r4b_core.parallel import device

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stand-in is off where there is a GPU")


def in_megatron(source: str) -> object:
    """Evaluate ``source`` in a module that counts as Megatron-Core's and has its ``torch``."""
    import megatron.core.utils as core_utils

    return eval(source, {"torch": core_utils.torch, "__name__": "megatron.core.probe"})


@cpu_only
@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(2, device='cuda').device",
        "torch.empty(2, device=torch.cuda.current_device(), pin_memory=True).device",
        "torch.tensor([1.0], device=torch.device('cuda')).device",
        "torch.ones(2).cuda().device",
        "torch.cuda.current_device()",
    ],
)
def test_cuda_means_cpu_inside_megatron(source: str) -> None:
    assert in_megatron(source) == torch.device("cpu")


@cpu_only
def test_tensor_types_read_as_on_a_gpu_inside_megatron_only() -> None:
    assert in_megatron("torch.ones(1).type()") == "torch.cuda.FloatTensor"
    assert in_megatron("torch.ones(1, dtype=torch.bfloat16).type()") == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


@cpu_only
def test_our_own_code_still_raises_when_it_names_cuda() -> None:
    for slip in (lambda: torch.zeros(1, device="cuda"), lambda: torch.ones(1).cuda(), torch.cuda.current_device):
        with pytest.raises((AssertionError, RuntimeError)):
            slip()
    assert not torch.cuda.is_available()


@cpu_only
def test_activate_is_idempotent() -> None:
    before = (torch.Tensor.cuda, torch.Tensor.type, len(sys.meta_path))
    device.activate()
    device.activate()
    assert before == (torch.Tensor.cuda, torch.Tensor.type, len(sys.meta_path))


@cpu_only
def test_modules_imported_later_are_adapted() -> None:
    sys.modules.pop("megatron.core.transformer.dot_product_attention", None)
    import megatron.core.transformer.dot_product_attention as late

    assert late.torch is not torch and late.torch.cuda.current_device() == torch.device("cpu")


@cpu_only
def test_fused_functions_are_plain_and_the_compiler_is_left_alone() -> None:
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.jit import jit_fuser

    assert isinstance(fused_bias_swiglu.swiglu, types.FunctionType) and not hasattr(
        fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"
    )
    assert jit_fuser(len) is len
    assert torch.compile.__module__ == "torch"


@cpu_only
def test_other_code_still_compiles() -> None:
    compiled = torch.compile(lambda x: (x.to(torch.float64) * 2).sum(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).item() == 6


@cpu_only
def test_the_stand_in_generator_is_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    state = mcore_random._get_cuda_rng_state()
    first = torch.rand(3)
    mcore_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_backend_and_device_agree() -> None:
    assert ("nccl" in device.distributed_backend()) == (device.device().type == "cuda")


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE but not LOCAL_RANK"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "2"}, "LOCAL_RANK = 2, and this process sees 2 GPUs"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
        ({}, None),
    ],
)
def test_every_rank_needs_a_gpu_of_its_own(
    environment: dict[str, str], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if problem is None:
        device.select_device()
        assert chosen == [torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))]
    else:
        with pytest.raises(ValueError, match=problem):
            device.select_device()
        assert not chosen
