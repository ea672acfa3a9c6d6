"""What arXiv 2406.10594 prints. Shares and scores in percent. Its LaCo is that of the published code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A row of a table."""

    ratio: float
    average: float | None = None
    perplexity: float | None = None


MAIN = {
    "Llama2-7B": {
        "dense": Printed(0, 68.96, 5.47), "slicegpt": Printed(21.45, 57.83, 30.74),
        "laco-code": Printed(21.02, 54.82, 50.39),
        "rm": Printed(21.02, 37.98, 676.80), "shortgpt": Printed(21.02, 58.18, 18.45),
        "blockpruner": Printed(21.99, 60.17, 11.51),
    },
    "Llama2-13B": {
        "dense": Printed(0, 71.72, 4.89), "slicegpt": Printed(21.52, 62.31, 23.95),
        "laco-code": Printed(24.37, 56.21, 13.97),
        "rm": Printed(24.37, 63.05, 10.08), "shortgpt": Printed(24.37, 62.60, 20.06),
        "blockpruner": Printed(25.12, 64.53, 8.16),
    },
    "Baichuan2-7B": {
        "dense": Printed(0, 66.73, 6.04), "laco-code": Printed(21.57, 51.95, 26.46),
        "rm": Printed(21.57, 40.99, 189.78),
        "shortgpt": Printed(21.57, 50.88, 31.05), "blockpruner": Printed(22.45, 56.08, 15.38),
    },
    "Baichuan2-13B": {
        "dense": Printed(0, 69.25, 6.66), "laco-code": Printed(22.68, 54.59, 27.07), "rm": Printed(22.68, 59.14, 17.70),
        "shortgpt": Printed(22.68, 58.50, 20.69), "blockpruner": Printed(24.19, 59.47, 15.36),
    },
    "Qwen1.5-7B": {
        "dense": Printed(0, 65.48, 7.95), "laco-code": Printed(20.97, 53.03, 39.23),
        "rm": Printed(20.97, 48.40, 2026.31),
        "shortgpt": Printed(20.97, 53.26, 49.88), "blockpruner": Printed(21.83, 54.71, 20.58),
    },
    "Qwen1.5-14B": {
        "dense": Printed(0, 69.07, 7.44), "laco-code": Printed(22.25, 55.56, 16.32), "rm": Printed(22.25, 48.43, 55.99),
        "shortgpt": Printed(22.25, 44.72, 1237.21), "blockpruner": Printed(23.72, 60.45, 15.67),
    },
}  # fmt: skip
"""Table 1: perplexity on WikiText-2, and the average of five tasks."""

ABLATION = {
    "Llama2-7B": (60.17, 55.89, 58.63),
    "Llama2-13B": (64.53, 58.58, 62.91),
    "Baichuan2-7B": (56.08, 38.81, 54.76),
    "Baichuan2-13B": (59.47, 55.95, 58.22),
    "Qwen1.5-7B": (54.71, 37.72, 52.66),
    "Qwen1.5-14B": (60.45, 40.80, 60.10),
}
"""Table 2: average of BlockPruner, without search (one-shot), without blocks (layers)."""

METRIC = {
    "Llama2-7B": {
        "blockpruner": (Printed(16.98, 64.33), Printed(24.99, 57.65), Printed(30.00, 55.01), Printed(37.02, 49.36)),
        "finercut": (Printed(14.99, 63.76), Printed(26.00, 57.08), Printed(29.01, 53.71), Printed(37.02, 49.04)),
    },
    "Llama2-13B": {
        "blockpruner": (Printed(14.54, 69.38), Printed(25.12, 64.52), Printed(31.62, 61.52), Printed(34.88, 60.13)),
        "finercut": (Printed(14.54, 69.28), Printed(26.75, 64.36), Printed(32.45, 61.00), Printed(34.88, 59.61)),
    },
}
"""Table 4: importance by perplexity or by JS divergence."""

GRANULARITY = {
    "Llama2-7B": {
        "blockpruner": (Printed(30.00, 55.02, 16.28), Printed(37.02, 49.36, 27.47), Printed(43.03, 46.95, 49.65)),
        "layer": (Printed(30.03, 53.04, 16.58), Printed(36.04, 47.32, 27.05), Printed(42.05, 43.91, 60.85)),
    },
    "Llama2-13B": {
        "blockpruner": (Printed(31.62, 61.52, 9.64), Printed(36.52, 59.34, 12.54), Printed(41.39, 54.15, 17.02)),
        "layer": (Printed(31.68, 59.31, 10.48), Printed(36.56, 56.17, 13.29), Printed(41.43, 51.61, 18.04)),
    },
}
"""Table 5: blocks or layers, at higher ratios."""

SPEED = {
    "Llama2-7B": {"blockpruner": (24.00, 1.47), "slicegpt": (24.47, 1.25), "shortgpt": (24.03, 1.31)},
    "Llama2-13B": {"blockpruner": (21.05, 1.88), "slicegpt": (21.52, 1.78), "shortgpt": (21.93, 1.77)},
}
"""Table 6: share removed, and how many times faster 128 tokens are generated."""

TIME_S = {
    "Llama2-7B": {"blockpruner": 45 * 60, "slicegpt": 129 * 60, "shortgpt": 2 * 60, "rm": 60, "laco-code": 2 * 60},
    "Llama2-13B": {"blockpruner": 147 * 60, "slicegpt": 210 * 60, "shortgpt": 2 * 60, "rm": 60, "laco-code": 24 * 60},
}
"""Table 7, on two RTX 4090; of RM: less than a minute."""

AQUA = {
    "Llama2-7B": {"dense": 31.89, "blockpruner": 29.92, "shortgpt": 29.13, "rm": 29.92, "laco-code": 24.80},
    "Llama2-13B": {"dense": 30.31, "blockpruner": 29.53, "shortgpt": 27.95, "rm": 26.77, "laco-code": 27.95},
}
"""Table 8: accuracy on AQuA-RAT."""

NINE_TASKS = {
    "Llama2-7B": {"dense": 58.91, "slicegpt": 49.61, "laco-code": 48.18, "rm": 33.86, "shortgpt": 50.43,
        "blockpruner": 51.64},
    "Llama2-13B": {"dense": 60.99, "slicegpt": 53.23, "laco-code": 49.49, "rm": 53.42, "shortgpt": 53.90,
        "blockpruner": 55.55},
    "Baichuan2-7B": {"dense": 56.74, "laco-code": 45.36, "rm": 36.32, "shortgpt": 44.07, "blockpruner": 47.95},
    "Baichuan2-13B": {"dense": 59.42, "laco-code": 47.18, "rm": 50.70, "shortgpt": 50.47, "blockpruner": 51.16},
    "Qwen1.5-7B": {"dense": 58.01, "laco-code": 47.11, "rm": 42.32, "shortgpt": 46.72, "blockpruner": 47.68},
    "Qwen1.5-14B": {"dense": 60.28, "laco-code": 48.29, "rm": 42.97, "shortgpt": 38.77, "blockpruner": 52.47},
}  # fmt: skip
"""Table 10: average over the five tasks of Table 1, TruthfulQA, RACE, SWAG and OpenBookQA."""
