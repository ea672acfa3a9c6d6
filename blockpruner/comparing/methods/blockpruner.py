"""BlockPruner (arXiv 2406.10594)."""

from __future__ import annotations

from blockpruner.comparing.searched import Searched


class BlockPruner(Searched):
    name = "blockpruner"
    about = "greedy over MHA and MLP blocks by perplexity (arXiv 2406.10594)"
