"""Masks and windows to losses: the forked pass, and the plain loop that it is checked against."""
