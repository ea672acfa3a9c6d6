"""Pruning methods other than BlockPruner, one per file, for comparisons."""
