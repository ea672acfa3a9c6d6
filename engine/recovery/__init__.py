"""Post-training of a pruned model."""
