"""LoRA post-training of a pruned model."""
