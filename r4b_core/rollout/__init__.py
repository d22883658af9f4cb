"""Rollouts: an engine draws both modes for every prompt in one continuous batch."""
