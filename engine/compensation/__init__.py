"""Give back what removed blocks did: least squares on the output projections of the blocks that remain."""
