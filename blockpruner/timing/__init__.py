"""Measures how fast a model generates, and its memory."""
