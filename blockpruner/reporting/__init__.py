"""Draws figures of runs, one per file, and writes one self-contained page."""
