"""Writes a checkpoint without the removed blocks, from a run or a removal order."""
