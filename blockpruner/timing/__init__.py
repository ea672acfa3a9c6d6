"""How fast a model generates, and its memory."""
