"""Search strategies: one a file. They propose masks, are told scores, and know nothing of torch or Ray."""
