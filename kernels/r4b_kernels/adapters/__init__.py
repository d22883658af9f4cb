"""The kernels inside other people's trainers: ``huggingface``, ``trl``, ``verl`` and ``megatron``.

Importing them imports torch alone: each reaches for its package where it is used. ``grpo`` and ``padded`` need none:
GRPO's loss on the head, and padded batches as streams with each prompt once. The versions they are tested with are
those of ``constraints.txt`` and ``tests/oracles.txt``.
"""
