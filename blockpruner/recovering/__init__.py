"""Recovers the quality of a pruned checkpoint by post-training."""
