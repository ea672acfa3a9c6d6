"""Methods of compensation, one per file."""
