"""What a mask is scored by, one metric a file."""
