"""Pruned checkpoints: one format a file."""
