"""What a search costs, in plain numbers: sizes of blocks, FLOPs of a sweep, units of work, bytes of memory."""
