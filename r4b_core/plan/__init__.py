"""What a run will need and take before any GPU is asked: memory per rank, step time, layouts ranked.

Everything is arithmetic on shapes, so it runs anywhere. r4b itself has not been measured on a GPU: predictions are the
cost model's, which ``docs/plan.md`` compares with what others published.
"""
