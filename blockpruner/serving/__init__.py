"""Exports in the runtimes that they are for."""
