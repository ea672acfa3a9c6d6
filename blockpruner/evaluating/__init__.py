"""Tasks and perplexity of a model, a checkpoint, or the masks of a run."""
