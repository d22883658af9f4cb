"""Learner: model chunks, optimizer and schedule joined into one update that is the same for every layout.

With micro-batches m on every data- and context-parallel rank, the update's gradient is

    sum over m, data and context ranks of d loss_sum / total denominator.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from r4b_core.parallel import optimizer as optim_lib
from r4b_core.parallel.collectives import broadcast_json, broadcast_tree
from r4b_core.parallel.runtime import Runtime


class TrainingDiverged(ValueError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Batch(Protocol):
    """A micro-batch: ``num_tokens`` is T, the full stream before context or sequence parallelism cut it."""

    @property
    def num_tokens(self) -> int: ...


LossFn = Callable[[torch.nn.Module, Any, Any], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(model, batch, output of the last stage) -> (sum of the loss, denominator, sums to report): this rank's share."""


@dataclass(frozen=True)
class StepResult:
    """One update, the same numbers on every rank.

    Attributes:
        loss: loss_sum / denominator over all micro-batches and ranks.
        denominator: the total that divided the gradient.
        metrics: the loss function's sums over all micro-batches, data and context ranks.
        grad_norm: L2 norm before clipping; 0 where nothing was computed.
        lr: learning rate of parts without a multiplier that follow the schedule.
        skipped: True if the parameters were left as they were, for ``reason``.
    """

    loss: float
    denominator: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool = False
    reason: str = ""


class Learner:
    """Owns the model's chunks (wrapped in Megatron-Core's DDP), the optimizer and the schedule.

    A chunk is a ``MegatronModule`` with ``config`` and ``set_input_tensor``; ``chunk(batch)`` returns on the last
    pipeline stage whatever ``loss_fn`` understands, on the others the hidden stream [T / (cp * tp under SP), 1, H].
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        runtime: Runtime,
        optim: optim_lib.Optim,
        *,
        total_steps: int,
        freeze: Sequence[str] = (),
        max_skipped: int = 10,
        overlap_grad_reduce: bool = False,
    ) -> None:
        """Wrap the chunks and build the optimizer. A collective of all ranks.

        Args:
            model_chunks: this rank's pipeline stage, or its ``runtime.virtual_stages`` chunks (interleaved 1F1B).
            total_steps: length of the schedule.
            freeze: parameter-name prefixes that stay fixed.
            max_skipped: skipped updates in a row that are borne before :class:`TrainingDiverged`.
            overlap_grad_reduce: reduce gradients while the backward pass still runs. Every trainable parameter must
                then take part in every micro-batch.

        Raises:
            ValueError: a prefix matches no parameter, or there is another number of chunks than the layout has.
        """
        if len(model_chunks) != runtime.virtual_stages:
            raise ValueError(
                f"model_chunks: {len(model_chunks)} of them, and parallel.virtual_stages = {runtime.virtual_stages}: "
                "build one for each virtual stage"
            )
        self.runtime, self.optim, self.total_steps, self.max_skipped = runtime, optim, total_steps, max_skipped
        self.step_count = 0
        self.skipped_in_a_row = 0
        optim_lib.freeze(model_chunks, optim, freeze)
        self.config = model_chunks[0].config
        self._prepare_config()
        self.chunks = [self._wrap(chunk, overlap_grad_reduce, index) for index, chunk in enumerate(model_chunks)]
        if overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.optimizer = optim_lib.build_optimizer(self.chunks, optim)
        self._sums = _Sums(runtime)

    @property
    def models(self) -> list[torch.nn.Module]:
        """This rank's chunks, unwrapped."""
        return [chunk.module for chunk in self.chunks]

    @property
    def model(self) -> torch.nn.Module:
        """This rank's pipeline stage, unwrapped, where it is one chunk."""
        (model,) = self.models
        return model

    def _prepare_config(self) -> None:
        config = self.config
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = self._finalize

    def _wrap(self, chunk: torch.nn.Module, overlap: bool, index: int) -> DistributedDataParallel:
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=self.runtime.distributed_optimizer,
            overlap_grad_reduce=overlap,
            grad_reduce_in_fp32=True,
        )
        # The reduction of a later chunk overlaps with the work of others as a whole.
        return DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)

    def step(self, microbatches: Sequence[Batch], loss_fn: LossFn) -> StepResult:
        """One update from this rank's micro-batches. A collective of all ranks.

        Ranks of one pipeline, tensor and context group get the same micro-batches; data-parallel ranks their own, in
        any number above zero. Loss functions report the same metric names everywhere.

        Raises:
            ValueError: no micro-batch, or metric names that differ between ranks.
            TrainingDiverged: the update had to be skipped ``max_skipped`` times in a row.
        """
        if not microbatches:
            raise ValueError("microbatches is empty: every rank needs at least one (its weights may be zero)")
        lr = optim_lib.learning_rate(self.step_count, self.optim, self.total_steps)
        self.step_count += 1
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._sums.clear()
        self._run(self.chunks, microbatches, partial(self._loss, loss_fn), forward_only=False)
        totals = self._sums.totals
        denominator, loss_sum = totals.pop("denominator"), totals.pop("loss_sum")
        if denominator == 0:
            return StepResult(0.0, 0.0, totals, 0.0, lr, True, "the denominator is 0: no row of this step carries loss")
        loss = loss_sum / denominator
        optim_lib.set_hyperparameters(self.optimizer, self.optim, self.step_count - 1, self.total_steps)
        overflow = self.optimizer.prepare_grads()
        grad_norm = optim_lib.gradient_norm(self.optimizer)
        if overflow or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = f"loss {loss} and gradient norm {grad_norm} are not both finite"
            self._skip(reason)
            return StepResult(loss, denominator, totals, grad_norm, lr, True, reason)
        self.skipped_in_a_row = 0
        optim_lib.clip_gradients(self.optimizer, grad_norm, self.optim.clip_grad)
        self.optimizer.step_with_ready_grads()
        return StepResult(loss, denominator, totals, grad_norm, lr)

    def _skip(self, reason: str) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise TrainingDiverged(
                f"{self.skipped_in_a_row} updates in a row were skipped, the last at step {self.step_count - 1}: "
                f"{reason}. "
                "The parameters are those before the first of them: go back to the last checkpoint with a lower "
                "optim.lr, or look at the batches of these steps"
            )

    def forward_only(
        self,
        microbatches: Sequence[Batch],
        fn: Callable[[torch.nn.Module, Any, Any], Any],
        *,
        model: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
        broadcast: bool = False,
    ) -> list[Any] | None:
        """``fn(model, batch, output)`` of each micro-batch, without gradients and in eval mode.

        Returns the list on the last pipeline stage, None on the others; with ``broadcast`` the list on every stage, for
        which ``fn`` returns nested lists or dicts of tensors and JSON-able values. ``model`` takes the learner's place
        (a frozen reference of the same layout, or its chunks).
        """
        if not microbatches:
            return []
        chunks = self.chunks if model is None else [model] if isinstance(model, torch.nn.Module) else list(model)
        training = chunks[0].training
        for chunk in chunks:
            chunk.eval()

        def collect(
            model: torch.nn.Module, batch: Any, output: Any, is_filler: bool, non_loss_data: bool = True
        ) -> Any:
            return fn(model, batch, output)

        with torch.no_grad():
            outputs = self._run(chunks, microbatches, collect, forward_only=True)[: len(microbatches)]
        for chunk in chunks:
            chunk.train(training)
        if not broadcast:
            return outputs if self.runtime.is_last_stage else None
        source = dist.get_process_group_ranks(self.runtime.pp_group)[-1]
        return broadcast_tree(outputs, source, self.runtime.device, self.runtime.pp_group)

    def _run(
        self, chunks: list[Any], microbatches: Sequence[Batch], after: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """Megatron-Core's schedule; ``after(model, batch, output)`` follows the last stage's forward pass.

        Interleaving goes round by round with as many micro-batches as there are stages: the last round is filled up
        with the shortest one, whose ``after`` is told ``is_filler=True``.
        """
        fillers = -len(microbatches) % self.runtime.pp if len(chunks) > 1 else 0
        shortest = min(microbatches, key=lambda batch: batch.num_tokens)
        queue = [*((batch, False) for batch in microbatches), *[(shortest, True)] * fillers]
        lengths = {batch.num_tokens for batch in microbatches}
        for chunk in chunks:
            plain = getattr(chunk, "module", chunk)
            if not hasattr(plain, "model_type"):
                plain.model_type = ModelType.encoder_or_decoder  # the schedules ask for it
            if self.runtime.pp > 1:
                # Where lengths differ, each message tells its shape first.
                plain.config.variable_seq_lengths = len(lengths) > 1
                plain.config.pipeline_dtype = plain.config.params_dtype

        def forward_step(
            batches: Iterator[tuple[Batch, bool]], chunk: torch.nn.Module
        ) -> tuple[Any, Callable[..., Any]]:
            batch, is_filler = next(batches)
            output = chunk(batch)
            return output, partial(after, getattr(chunk, "module", chunk), batch, is_filler=is_filler)

        schedule = get_forward_backward_func(self.runtime.pp, len(chunks) if len(chunks) > 1 else None)
        iterators = [iter(queue) for _ in chunks]
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(queue),
            seq_length=microbatches[0].num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _loss(
        self, loss_fn: LossFn, model: torch.nn.Module, batch: Any, output: Any, is_filler: bool
    ) -> tuple[Tensor, Tensor, dict]:
        loss_sum, denominator, metrics = loss_fn(model, batch, output)
        if is_filler:
            loss_sum = loss_sum * 0
        else:
            self._sums.add(loss_sum, denominator, metrics)
        # Megatron-Core counts whole tokens here; our denominators are sums of weights, so _finalize divides instead.
        return loss_sum, torch.zeros((), dtype=torch.int, device=loss_sum.device), {}

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(chunks, None, **kwargs)
        denominator = self._sums.reduce()["denominator"]
        if denominator:
            for chunk in chunks:
                chunk.scale_gradients(1.0 / denominator)


class _Sums:
    """Sums over micro-batches, then over data and context ranks, then told to every rank."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.known: dict[int, list[str]] = {}
        self.clear()

    def clear(self) -> None:
        self.local: dict[str, Tensor] = {}
        self.totals: dict[str, float] = {}

    def add(self, loss_sum: Tensor, denominator: Tensor, metrics: dict[str, Tensor]) -> None:
        for name, value in {**metrics, "loss_sum": loss_sum, "denominator": denominator}.items():
            value = torch.as_tensor(value, device=self.runtime.device).detach().to(torch.float64)
            self.local[name] = self.local[name] + value if name in self.local else value

    def reduce(self) -> dict[str, float]:
        """Two small all-reduces over the world: one to agree on the names, one for the values.

        Only the first tensor-parallel rank of a last stage contributes; all others add zeros. So every rank reads the
        same bits.
        """
        names = self._agree()
        speaks = self.runtime.is_last_stage and self.runtime.tp_rank == 0
        if speaks:
            values = torch.stack([self.local[name] for name in names])
        else:
            values = torch.zeros(len(names), dtype=torch.float64, device=self.runtime.device)
        if self.runtime.world > 1:
            dist.all_reduce(values)
        self.totals = dict(zip(names, values.tolist(), strict=True))
        return self.totals

    def _agree(self) -> list[str]:
        names = sorted(self.local)
        if self.runtime.world == 1:
            return names
        check = float(zlib.crc32("\n".join(names).encode()))
        vote = [check, -check] if self.runtime.is_last_stage else [-math.inf, -math.inf]
        votes = torch.tensor(vote, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        highest, lowest = votes[0].item(), -votes[1].item()
        if highest != lowest:
            raise ValueError(
                f"loss_fn reports other metric names on other ranks (here: {', '.join(names) or 'not last stage'}): "
                "return every name on every rank, with 0 where there is nothing to count"
            )
        if int(highest) not in self.known:
            source = self.runtime.last_stage_source
            self.known[int(highest)] = broadcast_json(names, source, self.runtime.device)
        return self.known[int(highest)]
