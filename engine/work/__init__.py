"""The cost of a search in plain numbers: sizes of blocks, FLOPs of a sweep, units of work, bytes of memory."""
