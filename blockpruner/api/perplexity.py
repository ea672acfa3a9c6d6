"""The perplexity of a model in memory. `commands.evaluate` also takes names, several texts and tasks."""

from __future__ import annotations

from transformers import PreTrainedModel

from blockpruner.api.models import as_it_was
from blockpruner.engine.calibration import Windows
from blockpruner.engine.judge.evaluation import evaluate_perplexity


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """exp of the mean over windows of the mean token NLL; NaN if a window's loss is not finite."""
    with as_it_was(model):
        return evaluate_perplexity(model.eval(), windows.tokens).value
