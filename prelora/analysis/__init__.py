"""What a run cost and what it gave: FLOPs and the ceiling on the speed-up, run records, figures, the report."""
