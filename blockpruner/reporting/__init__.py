"""Runs to pictures and one self-contained page: one picture a file."""
