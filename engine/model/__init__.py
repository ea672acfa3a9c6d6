"""Models: load them, find their blocks, place them on devices, and remove blocks from them."""
