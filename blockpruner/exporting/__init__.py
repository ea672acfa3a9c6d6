"""Exports a pruned checkpoint to a format that a runtime can load."""
