"""The kernels inside other people's trainers, one module each: ``huggingface``, ``trl``, ``verl``, ``megatron``.

Importing r4b_kernels imports none of them, and each imports its package when it is itself imported, or later. The
versions they are tested with are those of ``constraints.txt`` and ``tests/oracles.txt``.
"""
