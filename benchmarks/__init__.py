"""One file a question: a table for people, one JSON line last."""
