"""One file a benchmark's scorer, and what they share: `metrics.py`, `bertscore.py`, and in `common.py` reading, table and JSON."""
