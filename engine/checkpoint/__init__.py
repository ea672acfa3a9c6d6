"""Writers of pruned checkpoints, one format per file."""
