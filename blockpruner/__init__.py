"""BlockPruner: finds the attention and MLP blocks that a language model can do without, and removes them."""
