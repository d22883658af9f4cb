"""AdamW over Megatron-Core's optimizers, with one learning rate per part of the model, and its schedule.

The inner step is TransformerEngine's or Apex's FusedAdam where one is installed, else :class:`GroupStepAdamW`, which
keeps the same state (step per parameter group, two moments per parameter), hence the same checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import megatron.core.optimizer as mcore_optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from r4b_core.parallel import device
from r4b_core.parallel.names import global_names, has_prefix


class Optim(Protocol):
    """What is read of the recipe's ``OptimConfig``."""

    lr: float
    min_lr_ratio: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    warmup_steps: int
    schedule: str
    lr_scale: dict[str, float]
    constant: Sequence[str]


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2) whose ``step`` lies in the parameter group, as FusedAdam's does.

    torch's AdamW keeps a step per parameter, which Megatron-Core's distributed optimizer neither saves nor restores
    per parameter. One fused pass over each group, elementwise, hence bitwise repeatable on the same shards.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is built"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            # Groups are aligned over ranks, and so may be empty on one: their step counts on all the same.
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._moments(param) for param in params]
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]), device=params[0].device)] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=float(group["weight_decay"]),
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _moments(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def install_adam() -> bool:
    """Give Megatron-Core :class:`GroupStepAdamW` where it has no FusedAdam. True if ours is in use."""
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = GroupStepAdamW
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        # The code path of FusedAdam: the step is read from the parameter groups.
        distrib_optimizer.Adam = GroupStepAdamW
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True
    return mcore_optimizer.Adam is GroupStepAdamW


def longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """The longest of ``prefixes`` that matches a global name."""
    return max((prefix for prefix in prefixes if has_prefix(name, prefix)), key=len, default=None)


def lr_multiplier(name: str, lr_scale: dict[str, float]) -> float:
    """The multiplier of the longest prefix in ``lr_scale`` that matches a global name, else 1."""
    prefix = longest_prefix(name, lr_scale)
    return 1.0 if prefix is None else float(lr_scale[prefix])


def freeze(model_chunks: Sequence[torch.nn.Module], optim: Optim, prefixes: Sequence[str] = ()) -> None:
    """Stop the gradients of every parameter under ``prefixes`` or with a learning-rate multiplier of 0.

    Must come before the model is wrapped in DDP. A collective of all ranks.

    Raises:
        ValueError: a prefix matches no parameter on any rank, or a multiplier is negative.
    """
    for prefix, scale in optim.lr_scale.items():
        if scale < 0 or not math.isfinite(scale):
            raise ValueError(f"optim.lr_scale[{prefix!r}] = {scale}: a multiplier is finite and 0 (frozen) or more")
    settings = {"freeze": prefixes, "optim.lr_scale": list(optim.lr_scale), "optim.constant": optim.constant}
    _check_prefixes(model_chunks, [(setting, prefix) for setting, given in settings.items() for prefix in given])
    for chunk in model_chunks:
        names = global_names(chunk)
        for name, param in chunk.named_parameters():
            known = names[name]
            if lr_multiplier(known, optim.lr_scale) == 0 or longest_prefix(known, prefixes) is not None:
                param.requires_grad_(False)


def _check_prefixes(model_chunks: Sequence[torch.nn.Module], given: list[tuple[str, str]]) -> None:
    """``given``: (setting, prefix), the same on all ranks."""
    if not given:
        return
    names = [name for chunk in model_chunks for name in global_names(chunk).values()]
    hits = [float(any(has_prefix(name, prefix) for name in names)) for _, prefix in given]
    found = torch.tensor(hits, device=device.device())
    # A pipeline stage holds only some parts: a prefix must match on at least one rank.
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    for (setting, prefix), hit in zip(given, found.tolist(), strict=True):
        if not hit:
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise ValueError(
                f"{setting} names {prefix!r}, but no parameter's name begins with it: the parts on this rank are "
                f"{parts} (a tied head is its embedding table, layers are counted over all pipeline stages)"
            )


def build_optimizer(model_chunks: Sequence[torch.nn.Module], optim: Optim) -> MegatronOptimizer:
    """Megatron-Core's optimizer over DDP-wrapped chunks: distributed if their DDP is, else whole on every rank.

    No weight decay on parameters of one dimension or less. Parameters without ``requires_grad`` are left out. The
    moments exist from the start, so a checkpoint before the first update is complete too.
    """
    install_adam()
    chunks = list(model_chunks)
    ddp, model_config = chunks[0].ddp_config, chunks[0].config
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=model_config.params_dtype == torch.bfloat16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=_group_overrides(chunks, optim))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def _group_overrides(model_chunks: Sequence[torch.nn.Module], optim: Optim) -> dict[ParamKey, dict[str, float | bool]]:
    """What sets a parameter's group apart. Megatron-Core finds a checkpoint's groups by these fields, and by no others:
    "decoupled" is its name for a rate that does not follow the schedule."""
    known: dict[torch.Tensor, str] = {}
    for chunk in model_chunks:
        names = global_names(chunk)
        known.update((param, names[name]) for name, param in chunk.named_parameters())

    def key(label: str, matches: Callable[[torch.Tensor], bool]) -> ParamKey:
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=lambda param, _: matches(param)))

    def has_scale(param: torch.Tensor, scale: float) -> bool:
        return lr_multiplier(known[param], optim.lr_scale) == scale

    overrides: dict[ParamKey, dict[str, float | bool]] = {
        key("no_weight_decay", lambda param: param.dim() <= 1): {"wd_mult": 0.0},
        key("constant", lambda param: longest_prefix(known[param], optim.constant) is not None): {
            "is_decoupled_lr": True
        },
    }
    for scale in sorted({float(value) for value in optim.lr_scale.values()} - {1.0}):
        overrides[key(f"lr_scale_{scale}", partial(has_scale, scale=scale))] = {"lr_mult": scale}
    return overrides


def learning_rate(step: int, optim: Optim, total_steps: int) -> float:
    """Learning rate of update ``step`` (from 0) of ``total_steps``: linear warm-up, then the schedule.

    The last update of ``cosine`` and ``linear`` has ``lr * min_lr_ratio``; later ones keep it.

    Raises:
        ValueError: the schedule's name is unknown.
    """
    if step < optim.warmup_steps or optim.schedule == "constant":
        return constant_rate(step, optim)
    span = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    if optim.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif optim.schedule == "linear":
        share = 1.0 - progress
    else:
        raise ValueError(f"optim.schedule = {optim.schedule!r}: choose constant, cosine or linear")
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * share)


def constant_rate(step: int, optim: Optim) -> float:
    """Learning rate of update ``step`` (from 0) of the parts that only warm up."""
    return optim.lr * min(1.0, (step + 1) / max(1, optim.warmup_steps))


def set_hyperparameters(optimizer: MegatronOptimizer, optim: Optim, step: int, total_steps: int) -> None:
    """Write the rates of update ``step`` and the rest of ``optim`` into every group.

    So a loaded checkpoint cannot keep older values.
    """
    scheduled, constant = learning_rate(step, optim, total_steps), constant_rate(step, optim)
    for group in optimizer.param_groups:
        group["lr"] = (constant if group["is_decoupled_lr"] else scheduled) * group["lr_mult"]
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"] = tuple(optim.betas)
        group["eps"] = optim.eps


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the whole gradient, the same on every rank. ``optimizer.prepare_grads()`` must have run."""
    total = torch.zeros((), dtype=torch.float64, device=device.device())
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    grads = [grad for part in parts for grad in part.get_main_grads_for_grad_norm()]
    if grads:
        norms = torch.stack(torch._foreach_norm(grads))
        total += norms.to(torch.float64).square().sum()
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return float(total.sqrt())


def clip_gradients(optimizer: MegatronOptimizer, norm: float, limit: float) -> None:
    """Scale the gradient in place so that its norm is at most ``limit``; 0 turns clipping off."""
    if limit <= 0 or norm <= limit:
        return
    grads = [param.grad for param in optimizer.get_parameters() if param.grad is not None]
    if grads:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
