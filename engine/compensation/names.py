"""Name the output projections of a model whose weights are not at hand."""

from __future__ import annotations

import re

from blockpruner.engine.compensation.projections import Projection, find_projections
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import load_config
from blockpruner.engine.model.outputs import failures_told
from blockpruner.engine.model.rehearsal import NUM_LAYERS, VOCABULARY, small_copy
from blockpruner.engine.sections import ModelSource


def projection_names(dense: ModelSource) -> frozenset[str]:
    """Return the names of output projections within their layers, such as `self_attn.o_proj`, as they are found by
    running a small random copy of the dense model. Raises UserError if there can be no such copy."""
    config = load_config(dense)
    # Outputs are then about as large as the stream: a norm that follows a much smaller one would see its own epsilon.
    spread = config.hidden_size**-0.5
    name = f"model type {config.model_type!r}"
    with failures_told(f"{name}: its output projections are looked for in a copy of a few layers, which fails with"):
        decoder = Decoder(small_copy(config, NUM_LAYERS, VOCABULARY, dense, spread))
        found = [one.name for one in find_projections(decoder).values() if isinstance(one, Projection)]
    return frozenset(re.sub(rf"^{re.escape(decoder.architecture.layers)}\.\d+\.", "", name) for name in found)
