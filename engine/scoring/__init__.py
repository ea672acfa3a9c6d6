"""Compute the losses of masks on windows: the forked pass, and the plain loop it is tested against."""
