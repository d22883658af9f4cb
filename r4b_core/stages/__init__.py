"""The stages of a run, each reading as its algorithm."""
