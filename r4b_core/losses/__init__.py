"""Losses: pure functions of tensors, and the heads that apply them to a model's loss rows."""
