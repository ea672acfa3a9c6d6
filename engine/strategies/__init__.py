"""Search strategies, one per file. Their base class is in `engine/search/strategy.py`."""
