"""Measure the quality and speed of a model: perplexity, tasks, generation."""
