"""Each file answers one question. It prints a table, and one JSON line at the end."""
