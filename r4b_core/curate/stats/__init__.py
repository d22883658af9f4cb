"""stats.html: what the data engine did to the data, on one self-contained page."""

from r4b_core.curate.stats.page import write_stats

__all__ = ["write_stats"]
