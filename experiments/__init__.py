"""The runs behind docs/results.md: declared in grid.yaml, trained by ``python -m experiments.run``."""
