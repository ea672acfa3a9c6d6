"""BlockPruner's engine: torch, one process. It knows nothing of Ray."""
