"""Export formats, one per file."""
