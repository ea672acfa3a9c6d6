"""A search: its config, its run directory, and the loop in which a strategy asks and a ledger is written."""
