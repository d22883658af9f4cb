"""What a run shows and leaves behind: metrics, alarms, rollouts, the report."""

from r4b_core.telemetry.run import RunFolder

__all__ = ["RunFolder"]
