"""Qwen3-VL: ViT with DeepStack, patch mergers, Qwen3 decoder with interleaved M-RoPE."""
