"""The compared methods, one idea per file."""
