"""How good and how fast a model is: perplexity, tasks, generation."""
