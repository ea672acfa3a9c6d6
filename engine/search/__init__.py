"""What search strategies build on: spaces of masks, oracles that score them, statistics. Free of torch and Ray."""
