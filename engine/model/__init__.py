"""A model: where it comes from, where its blocks are, how a device holds it, and what is left of it without some."""
