"""One of two tensor-parallel ranks of test_megatron.py: losses and whole gradients of its models, saved by rank 0.

Usage, under torchrun: megatron_ranks.py RESULTS
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r4b_core.config.recipe import ParallelConfig
from r4b_core.parallel.runtime import start
from r4b_kernels import PrefixLayout, policy_loss_head
from r4b_kernels.adapters import megatron as adapter

VOCABULARY, LENGTHS, PARENTS = 64, [5, 3, 1, 4, 2, 5], [-1, 0, 0, -1, 3, 3]  # a sum that two ranks can halve


class Norm(torch.nn.RMSNorm):
    """Megatron's own torch norm refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def results(tp: int, sequence_parallel: bool) -> dict[str, Tensor]:
    """Losses [1, T], a policy loss and every whole gradient of their sum. A collective of all ranks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)  # on the host Megatron draws whole matrices and keeps this rank's part
    sizes = dict(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2)
    plain = dict(attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, mrope_section=[2, 1, 1])
    layout_of_ranks = dict(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    spec = adapter.with_prefix_attention(TransformerBlockSubmodules(layer_specs=[layer], layer_norm=Norm))
    config = TransformerConfig(**sizes, **plain, **layout_of_ranks, normalization="RMSNorm")
    rope = dict(position_embedding_type="mrope", share_embeddings_and_output_weights=False)
    model = GPTModel(config, spec, VOCABULARY, 128, **rope)
    adapter.use_linear_logprob(model)

    tokens = sum(LENGTHS)
    drawn = torch.Generator().manual_seed(1)
    layout = PrefixLayout.from_lengths(LENGTHS, PARENTS)
    ids, labels = torch.randint(VOCABULARY, (2, 1, tokens), generator=drawn)
    weights, advantage = torch.randn(2, tokens, generator=drawn)
    begins = [0 if parent < 0 else LENGTHS[parent] for parent in PARENTS]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(begins, LENGTHS, strict=True)])
    inputs = (ids, positions.expand(3, 1, tokens), None)
    packed = adapter.packed_seq_params(layout)
    losses = model(*inputs, labels=labels, packed_seq_params=packed)
    hidden = model(*inputs, packed_seq_params=packed)
    weight, group = adapter.head(model)
    old = torch.full((tokens,), -4.0)
    policy = policy_loss_head(hidden[0], weight, labels[0], old, advantage, weights.abs(), group=group).loss
    ((losses * weights).sum() + policy).backward()
    found = {"losses": losses.detach(), "policy": policy.detach(), "hidden": hidden.detach()}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter, parameter.grad, tp)
    return found


def whole(parameter: Any, gradient: Tensor, tp: int) -> Tensor:
    """The gradient of the uncut parameter. Norms under sequence parallelism saw a part of the tokens each."""
    if tp == 1:
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(tp)]
    dist.all_gather(parts, gradient.contiguous())
    if getattr(parameter, "tensor_model_parallel", False):
        return torch.cat(parts, dim=parameter.partition_dim)
    return sum(parts[1:], parts[0]) if getattr(parameter, "sequence_parallel", False) else gradient


def main() -> None:
    saved = {}
    for sequence_parallel in (False, True):
        place = start(ParallelConfig(tp=2, sequence_parallel=sequence_parallel), seed=0)
        saved[sequence_parallel] = results(2, sequence_parallel)
        rank = dist.get_rank()
        place.stop()
    if rank == 0:
        torch.save(saved, sys.argv[1])


if __name__ == "__main__":
    main()
