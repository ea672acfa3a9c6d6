"""Several methods on one model, the same text and the same judge."""
