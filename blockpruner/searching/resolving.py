"""A config with every automatic choice made and everything small read: the windows, the model's shape, no weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockpruner.cluster.opening import choose_device
from blockpruner.engine.calibration import Windows, calibration_windows
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import (
    DTYPES,
    ModelSource,
    check_positions,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_dtype,
)
from blockpruner.engine.work.memory import ModelBytes
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter


@dataclass(frozen=True)
class Job:
    model: ModelSource
    """What replicas load."""
    device: str
    """cpu or cuda."""
    dtype: str
    windows: Windows
    shape: ModelShape

    @property
    def sizes(self) -> ModelBytes:
        return ModelBytes.of(self.shape, self.bytes_per_value)

    @property
    def bytes_per_value(self) -> int:
        return DTYPES[self.dtype].itemsize


def prepare(config: SearchConfig, reporter: Reporter) -> Job:
    """Make the choices and say them. Raises UserError before anything slow is begun.

    With config.address, the cluster has been joined.
    """
    device = choose_device(config, config.device, reporter.say)
    dtype, reason = resolve_dtype(config.dtype, config.source, torch.device(device))
    reporter.say(f"model {config.model} in {dtype} ({reason}) on {device}")
    model = materialize(config.source, dtype, reporter.say)
    skeleton = meta_model(model, dtype)
    shape = Decoder(skeleton).shape
    check_positions(skeleton.config, config.seq_len)
    config.strategy_over(config.space(shape))  # refuses what this model cannot do
    windows = calibration_windows(
        config.calibration,
        load_tokenizer(model),
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        text_column=config.text_column,
        num_windows=config.num_windows,
    )
    for note in windows.notes:
        reporter.say(f"note: {note}")
    reporter.say(
        f"{2 * shape.num_layers} blocks, {shape.num_parameters:,} parameters; calibration on {config.calibration}: "
        f"{windows.num_windows} windows of {windows.seq_len} tokens from {windows.num_rows} rows"
    )
    return Job(model, device, dtype, windows, shape)
