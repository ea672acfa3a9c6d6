"""Compensates a pruned checkpoint: fits the output projections of the blocks that remain."""
