"""One file a benchmark's scorer, and the metrics that they share (`metrics.py`)."""
