"""Evaluates tasks and perplexity for a model, a checkpoint or the masks of a run."""
