"""Model families on Megatron-Core layers whose attention, norms, rope and head are r4b_kernels."""
