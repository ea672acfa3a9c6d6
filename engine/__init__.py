"""The engine: torch code that runs in one process. It does not depend on Ray or on a command line."""
