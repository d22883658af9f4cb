"""What a run shows and leaves behind: metrics, alarms, rollouts, the report."""
