"""Where tensors live and how ranks talk: all that running Megatron-Core without a GPU takes.

Megatron-Core names CUDA in its source. Where there is no GPU, :func:`activate` gives *its* modules, and no others, a
``torch`` in which CUDA means the CPU. With a GPU it does nothing. Our own code asks :func:`device` and
:func:`distributed_backend`, and never writes ``torch.cuda``, so on a CPU a slip of ours raises instead of passing.

What changes, inside ``megatron.*`` only:

====================================================  ==================================================================
call in Megatron-Core                                 on a CPU
====================================================  ==================================================================
``torch.cuda.current_device()``                       ``torch.device("cpu")``
``torch.cuda.synchronize``, ``empty_cache``, streams  nothing to do
``torch.cuda.manual_seed``, ``get/set_rng_state``     the CPU's default generator
``torch.zeros(..., device="cuda")`` and the like      the same on the CPU, ``pin_memory`` dropped
``tensor.cuda()``                                     the tensor itself
``tensor.type()``                                     the name of the CUDA type (compared with strings only)
a process group, made for each role and each layout   one group for the same ranks, kept for the process
``@jit_fuser``, ``@torch.compile``                    the plain function: no compiler runs on a CPU
====================================================  ==================================================================

``torch.cuda.is_available()`` stays False, since several paths choose the CPU by it. No environment variable is set or
needed on a CPU; on a GPU see :func:`select_device`.

It does not matter which is imported first, but with this module before ``megatron`` the import is quiet and faster.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_HARMLESS_WARNINGS = (
    r".*Transformer Engine and Apex are not installed.*",
    r".*transformer_engine.*not (installed|found|available).*",
    r".*[Aa]pex (is )?not (installed|found|available).*",
    r".*all_gather_into_tensor.*deprecated.*",
    r".*reduce_scatter_tensor.*deprecated.*",
    r".*_all_gather_base.*deprecated.*",
    r".*_reduce_scatter_base.*deprecated.*",
    r".*Please use DTensor instead and we are deprecating ShardedTensor.*",
)
_HARMLESS_IN_MEGATRON = (
    r".*full scope is deprecated.*",
    r".*set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*",
    r".*`load_state_dict` is deprecated.*",
    r".*The \.grad attribute of a Tensor that is not a leaf Tensor.*",
)

_active = False


def device() -> torch.device:
    """The device of this rank: its GPU (``LOCAL_RANK``), or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def distributed_backend() -> str:
    """``nccl`` for tensors on GPUs with ``gloo`` for those on the host, or ``gloo`` alone."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def synchronize() -> None:
    """Wait until the device has done all it was given (nothing to wait for on a CPU)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def select_device(*, overlap: bool = False) -> None:
    """Make this rank's GPU the current one. Must come before the first collective and before any tensor lies on it.

    With ``overlap`` (tensor parallelism) work is queued in the order of its launch, which Megatron-Core's overlap of
    communication with matrix products relies on: ``CUDA_DEVICE_MAX_CONNECTIONS`` is set to 1 unless it is set already.

    Raises:
        ValueError: this rank has no GPU of its own: ``LOCAL_RANK`` is missing, or there are more ranks than GPUs.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count > 1 and "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"the environment has WORLD_SIZE but not LOCAL_RANK: all ranks here would take the first of {count} "
                "GPUs; start with torchrun, or set LOCAL_RANK to the rank on this machine"
            )
        if (index := device().index) >= count:
            raise ValueError(
                f"LOCAL_RANK = {index}, and this process sees {count} GPU{'s' if count > 1 else ''}: start no more "
                "ranks on this machine (torchrun --nproc-per-node), or set LOCAL_RANK=0 where each sees only its own"
            )
        if overlap:
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device())


def get_rng_state() -> torch.Tensor:
    """State of the generator that the device's random numbers come from, uint8 on the host."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Inverse of :func:`get_rng_state`."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def activate() -> None:
    """Make Megatron-Core run on this machine's device. Idempotent; does nothing where there is a GPU."""
    global _active
    _silence()
    if torch.cuda.is_available() or _active:
        return
    stand_in = _cpu_torch()
    sys.meta_path.insert(0, _MegatronFinder(stand_in))
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _adapt(module, stand_in)
    _patch_tensor_methods()
    _share_gloo_device()
    _active = True


def _share_gloo_device() -> None:
    """Let all gloo groups of this process share one device.

    Each would make its own otherwise, whose thread polls a hundred times a second: on a small machine the polling alone
    takes most of its time.
    """
    gloo = torch.distributed.ProcessGroupGloo
    shared = gloo.create_default_device()

    class SharedDeviceGloo(gloo):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = gloo._Options()
            options._devices, options._timeout, options._threads = [shared], timeout, 1
            super().__init__(store, rank, size, options)

    torch.distributed.distributed_c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]


class _Groups:
    """One gloo group for each set of ranks.

    Megatron-Core makes dozens of groups over a few sets of ranks and never closes them; each has threads and sockets of
    its own. Every rank asks for the same groups in the same order, and so finds them alike.
    """

    def __init__(self) -> None:
        self.world: Any = None
        self.known: dict[tuple[int, ...], Any] = {}

    def create(self, ranks: list[int], timeout: timedelta | None = None, **_: Any) -> Any:
        dist = torch.distributed
        if self.world is not dist.group.WORLD:
            self.world, self.known = dist.group.WORLD, {}
        key = tuple(sorted(ranks))
        if len(key) == dist.get_world_size():
            group = self.world
        elif key in self.known:
            group = self.known[key]
        else:
            group = self.known[key] = dist.new_group(ranks=list(key), timeout=timeout)
        if timeout is not None and dist.get_rank() in key:
            group._get_backend(torch.device("cpu"))._set_default_timeout(timeout)
        return group


def close_groups(groups: Iterable[Any]) -> None:
    """Close the groups of a layout that has ended; on a CPU they are kept for the next one."""
    if torch.cuda.is_available():
        for group in groups:
            # Megatron-Core has closed some itself.
            if group in torch.distributed.distributed_c10d._world.pg_map:
                torch.distributed.destroy_process_group(group)


def _silence() -> None:
    for pattern in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for pattern in _HARMLESS_IN_MEGATRON:
        warnings.filterwarnings("ignore", message=pattern, module=r"megatron\.")
    # It warns of every MLP that is not its own class, ours among them.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # Its tracker keeps "GPU" states in the CPU generator here, so it warns at each fork.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _is_megatron(name: str) -> bool:
    return name == "megatron" or name.startswith("megatron.")


def _names_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


class _Stream:
    """Stands for a CUDA stream where work is done at once."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def _cpu_torch() -> types.ModuleType:
    """A copy of the ``torch`` module in which CUDA means the CPU. ``torch`` itself is not touched."""
    cuda = _copy(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
        manual_seed_all=lambda seed: torch.default_generator.manual_seed(seed),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        current_stream=lambda *_: _Stream(),
        default_stream=lambda *_: _Stream(),
        nvtx=types.SimpleNamespace(range_push=lambda *_: 0, range_pop=lambda: 0),
    )
    return _copy(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _copy(module: types.ModuleType, **changes: Any) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(changes)
    return copy


def _adapt(module: types.ModuleType, stand_in: types.ModuleType) -> None:
    if vars(module).get("torch") is torch:
        module.torch = stand_in
    for name, value in list(vars(module).items()):
        # Decorated before this module came: back to the function itself.
        plain = getattr(value, "_torchdynamo_orig_callable", None)
        if isinstance(plain, types.FunctionType):
            setattr(module, name, plain)
    if module.__name__ == "megatron.core.jit":
        module.disable_jit_fuser()
    if module.__name__ == "megatron.core.parallel_state":
        module.create_group = _groups.create
        # It would close some groups, and they are to be used again.
        module.torch = _copy(
            module.torch, distributed=_copy(torch.distributed, destroy_process_group=lambda group: None)
        )
    if module.__name__ == "megatron.core.tensor_parallel.random":
        # Unpatched, the setter only queues its work until CUDA starts, so a state would never be restored.
        module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Adapts the ``megatron`` modules that are imported from now on."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                with _no_compiler():
                    execute(module)
                _adapt(module, self.stand_in)

            spec.loader.exec_module = exec_module
        return spec


def _patch_tensor_methods() -> None:
    """``tensor.cuda()`` and ``tensor.type()`` answer calls from ``megatron.*`` as a GPU would; others are as before."""
    cuda, type_ = torch.Tensor.cuda, torch.Tensor.type

    def from_megatron() -> bool:
        return _is_megatron(sys._getframe(2).f_globals.get("__name__", ""))

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if from_megatron() else cuda(self, *args, **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not from_megatron():
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda = tensor_cuda
    torch.Tensor.type = tensor_type


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """While open, ``torch.compile`` as a decorator returns the function it was given."""

    def plain(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else (lambda inner: inner)

    original = torch.compile
    torch.compile = plain
    try:
        yield
    finally:
        torch.compile = original


def _import_megatron() -> None:
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            stack.enter_context(_no_compiler())
        importlib.import_module("megatron.core")
        importlib.import_module("megatron.core.optimizer")


_groups = _Groups()
_import_megatron()
activate()
