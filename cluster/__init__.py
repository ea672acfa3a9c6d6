"""BlockPruner's orchestration: Ray, the run directory, the command line. It does no arithmetic on tensors."""
