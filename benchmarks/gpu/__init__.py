"""Does everything work on a GPU, and how fast? One command, without a network (`python -m benchmarks.gpu --help`)."""
