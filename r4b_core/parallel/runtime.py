"""The ranks of a job: start Megatron-Core's process groups from a layout, and take them down again.

Rank order, fastest first: tensor, context, data, pipeline.
"""

from __future__ import annotations

import gc
import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from r4b_core.parallel import device
from r4b_core.parallel.collectives import broadcast_json, gather_json

DEFAULT_TIMEOUT_S = 60.0


class LayoutError(ValueError):
    """The parallel layout does not fit the number of ranks."""


class Layout(Protocol):
    """What :func:`start` reads of ``ParallelConfig``; data parallelism is what the world size leaves over."""

    tp: int
    pp: int
    cp: int
    sequence_parallel: bool
    distributed_optimizer: bool
    virtual_stages: int


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the job: sizes, ranks and groups of tensor, pipeline, context and data parallelism.

    ``dp_cp_group`` joins the ranks that hold the same parameters; ``is_main`` is True on rank 0 alone. Every pipeline
    rank holds ``virtual_stages`` chunks of the model.
    """

    rank: int
    world: int
    tp: int
    pp: int
    cp: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    sequence_parallel: bool
    distributed_optimizer: bool
    virtual_stages: int
    seed: int
    timeout_s: float
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_source(self) -> int:
        """Global rank that speaks for the last pipeline stage (its first tensor, context and data rank)."""
        return self.world - self.world // self.pp

    @property
    def layout(self) -> dict[str, Any]:
        """The layout as plain values, for manifests and logs."""
        names = ("world", "tp", "pp", "cp", "dp", "sequence_parallel", "distributed_optimizer", "virtual_stages")
        return {name: getattr(self, name) for name in names}

    def barrier(self) -> None:
        dist.barrier()

    def broadcast_object(self, value: Any = None, source: int = 0) -> Any:
        """JSON-able ``value`` of rank ``source``, on every rank (tuples arrive as lists)."""
        return broadcast_json(value, source, self.device)

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """JSON-able ``value`` of every rank of ``group`` (the world if None), in rank order, on each of them."""
        return gather_json(value, self.device, group)

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is on at least one."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def stop(self) -> None:
        """Destroy the layout's groups. WORLD stays for the process, so :func:`start` may follow with another layout."""
        _stop()


def check_layout(parallel: Layout, world: int) -> int:
    """Data-parallel size of ``parallel`` over ``world`` ranks.

    Raises:
        LayoutError: the world size is not a multiple of tp * pp * cp, or a size is below one.
    """
    for name in ("tp", "pp", "cp", "virtual_stages"):
        if getattr(parallel, name) < 1:
            raise LayoutError(f"parallel.{name} = {getattr(parallel, name)}: must be 1 (off) or more")
    if parallel.sequence_parallel and parallel.tp == 1:
        raise LayoutError("parallel.sequence_parallel = true needs parallel.tp >= 2: raise tp or turn it off")
    if parallel.virtual_stages > 1 and parallel.pp == 1:
        raise LayoutError(
            f"parallel.virtual_stages = {parallel.virtual_stages}: interleaving needs parallel.pp >= 2; raise pp or "
            "take virtual_stages = 1"
        )
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world % model_ranks:
        raise LayoutError(
            f"parallel.tp * pp * cp = {parallel.tp} * {parallel.pp} * {parallel.cp} = {model_ranks} does not divide "
            f"the {world} rank{'s' if world > 1 else ''} of this job: start a multiple of {model_ranks} "
            f"(torchrun --nproc-per-node={model_ranks}) or lower tp, pp or cp"
        )
    return world // model_ranks


def start(parallel: Layout, *, seed: int, timeout_s: float | None = None) -> Runtime:
    """Join the job (torchrun's, or a world of one where there is none) and set up ``parallel``.

    Args:
        parallel: sizes; checked before anything is started.
        seed: of parameters and dropout; Python's, NumPy's and torch's host generators are seeded with it too.
        timeout_s: seconds after which a collective is an error; None takes ``parallel.timeout_s`` or 60.

    Raises:
        LayoutError: the layout does not fit the number of ranks.
        ValueError: torchrun's environment is incomplete, or a layout is still in place.
    """
    timeout_s = timeout_s if timeout_s is not None else getattr(parallel, "timeout_s", DEFAULT_TIMEOUT_S)
    rank, world = _place()
    dp = check_layout(parallel, world)
    if parallel_state.is_initialized():
        raise ValueError("a parallel layout is already in place: call Runtime.stop() before start()")
    device.activate()
    device.select_device(overlap=parallel.tp > 1)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        # A world of one keeps its store in memory: no port has to be agreed on or free.
        where: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        dist.init_process_group(device.distributed_backend(), timeout=timeout, **where)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        # Megatron-Core hands this number to timedelta(minutes=...), which takes fractions.
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]
    )
    seed_all(seed)
    return Runtime(
        rank=rank,
        world=world,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        dp=dp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.distributed_optimizer,
        virtual_stages=parallel.virtual_stages,
        seed=seed,
        timeout_s=float(timeout_s),
        device=device.device(),
    )


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's tracker; the same on every data-parallel rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _place() -> tuple[int, int]:
    """(rank, world size), from torchrun's environment or a group that exists."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return 0, 1
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise ValueError(
            f"the environment has {', '.join(present)} but not {missing}: start with torchrun, or unset them"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _stop() -> None:
    if not parallel_state.is_initialized():
        return
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    # Models of this layout hold its groups in reference cycles.
    gc.collect()
    device.close_groups(groups)
