"""Metrics that masks are scored by, one per file. Their base class is in `metric.py`."""
