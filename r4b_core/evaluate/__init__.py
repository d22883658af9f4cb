"""Evaluation on held-out items: forced direct, forced thinking and auto."""
