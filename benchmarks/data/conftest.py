"""Data benchmarks need no runtime: they measure the host alone."""
