"""What a training changes, one kind per file."""
