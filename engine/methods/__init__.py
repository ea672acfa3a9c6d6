"""What other methods judge blocks and layers by, one a file."""
