"""One file a benchmark's scorer, and what they share: `metrics.py`, `bertscore.py`, and in
`common.py` reading, table and JSON of texts; in `visual.py` images, embedders, table and JSON of
the visual ones, in `judge.py` their judge."""
