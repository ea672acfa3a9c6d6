"""Resolves a config: makes every automatic choice, and reads the windows and the model's shape, but no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blockpruner.cluster.opening import choose_device
from blockpruner.engine.blocks import Units
from blockpruner.engine.calibration import Windows, calibration_windows
from blockpruner.engine.compensation.config import IN_SEARCH_RIDGE, Fit
from blockpruner.engine.compensation.fitting import Cost, fit_flops
from blockpruner.engine.compensation.memory import FitMemory
from blockpruner.engine.compensation.methods.both import Both
from blockpruner.engine.compensation.stages import check_fittable
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.identity import Identity, identity, identity_in_memory
from blockpruner.engine.model.loading import (
    DTYPES,
    check_positions,
    check_tensors,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_dtype,
)
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.rows import check_texts
from blockpruner.engine.text.tokens import check_ids
from blockpruner.engine.work.memory import ModelBytes
from blockpruner.engine.work.shape import ModelShape
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.tables import read_table
from blockpruner.showing.console import Reporter


@dataclass(frozen=True)
class Given:
    """Objects that a Python caller already has in memory."""

    decoder: Decoder | None = None
    """The model; None to load it by name."""
    windows: Windows | None = None
    """The calibration windows; None to make them from the calibration text."""


NOTHING = Given()


@dataclass(frozen=True)
class FitJob:
    """The refits of a search."""

    windows: Windows
    """Windows to fit on. They are not scored."""
    every: int
    """Number of removals after which the blocks that remain are refitted."""
    memory: FitMemory
    cost: Cost
    flops: float
    """Approximate work of one refit."""


@dataclass(frozen=True)
class Job:
    """A resolved search."""

    model: ModelSource
    """The model that replicas load."""
    identity: Identity
    device: str
    """cpu or cuda."""
    dtype: str
    windows: Windows
    """Windows to score."""
    shape: ModelShape
    space: SearchSpace
    """That of one removal until `measuring.with_times`, where the budget is one in time and no table is given."""
    fit: FitJob | None = None
    """How to compensate during the search; None: not at all."""
    decoder: Decoder | None = None
    """The model, if the caller passed one. Then nothing is loaded."""
    times_setting: Mapping[str, Any] = field(default_factory=dict)
    """Device, dtype, threads and workload with which the times of the space were measured."""

    @property
    def is_cut(self) -> bool:
        """Whether blocks go in groups."""
        return self.space.units is not Units.BLOCKS

    @property
    def sizes(self) -> ModelBytes:
        return ModelBytes.of(self.shape, self.bytes_per_value)

    @property
    def bytes_per_value(self) -> int:
        return DTYPES[self.dtype].itemsize


def identify(config: SearchConfig, given: Given = NOTHING) -> Identity:
    """Identify the model of a search."""
    if given.decoder is not None:
        return identity_in_memory(given.decoder.model, config.model)
    return identity(config.source)


def prepare(
    config: SearchConfig, reporter: Reporter, given: Given = NOTHING, identified: Identity | None = None
) -> Job:
    """Make the automatic choices and report them. Raises UserError before any slow work begins.

    With config.address, Ray must have joined the cluster. identified: from `identify`, if it was called before.
    """
    identified = identified or identify(config, given)
    if given.decoder is not None:
        model, decoder = config.source, given.decoder
        device, dtype = decoder.device.type, str(decoder.model.dtype).removeprefix("torch.")
        reporter.say(f"the given model in {dtype} on {device}")
    else:
        device = choose_device(config, config.device, reporter.say)
        source = identified.at(config.source)
        dtype, reason = resolve_dtype(config.dtype, source, torch.device(device))
        reporter.say(f"model {config.model} in {dtype} ({reason}) on {device}")
        check_texts(config.calibration if given.windows is None else ())  # before weights are fetched
        model = materialize(source, dtype, reporter.say)
        decoder = Decoder(meta_model(model, dtype))
        for note in check_tensors(decoder.model, model):
            reporter.say(f"note: {note}")
    shape = decoder.shape
    windows = given.windows
    seq_len = config.seq_len if windows is None else windows.seq_len
    check_positions(decoder.model.config, seq_len)
    table = None
    if config.times is not None:
        table = read_table(config.times, identified, config.time_for, shape)
        table.tell(f"times of {config.times}", config.time_for, reporter)
    # Raises UserError if the options do not suit this model.
    space = config.space(shape, None if table is None else table.times)
    if windows is None:
        windows = calibration_windows(config, load_tokenizer(model), decoder.model.config.model_type)
    check_ids(windows.tokens, decoder.model.get_input_embeddings().num_embeddings)
    for note in windows.notes:
        reporter.say(f"note: {note}")
    fit = None
    if config.compensate:
        first = windows.num_windows - config.num_fitted(windows.num_windows)
        fitted_on = replace(windows, tokens=windows.tokens[first:])
        windows = replace(windows, tokens=windows.tokens[:first])
        check_fittable(decoder)
        memory = FitMemory.of(decoder, Fit(method=Both(), ridge=IN_SEARCH_RIDGE))
        fit = FitJob(
            fitted_on,
            config.compensate_every,
            memory,
            Cost.of(shape, memory.widest, windows.seq_len),
            fit_flops(shape, memory.widest, fitted_on.num_windows, windows.seq_len),
        )
    if whole := [str(one) for one in space.all_blocks if one.kind in config.units.cut and not space.is_cut(one)]:
        reporter.say(f"note: {', '.join(whole)} can only be removed as a whole")
    texts = " and ".join(config.calibration)
    reporter.say(
        f"{shape.num_blocks} blocks, {shape.num_parameters:,} parameters; calibration on {texts}: "
        f"{windows.num_windows} windows of {windows.seq_len} tokens from {windows.num_rows} rows"
        f"{'' if fit is None else f', and {fit.windows.num_windows} more to refit on'}"
    )
    if shape.note:
        reporter.say(f"note: {shape.note}")
    setting = {} if table is None else table.setting
    return Job(model, identified, device, dtype, windows, shape, space, fit, given.decoder, setting)
