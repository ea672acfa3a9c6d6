"""The engine: torch, in one process. It knows nothing of Ray or of a command line."""
