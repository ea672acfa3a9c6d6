"""Output projections are found in any dtype, also where the stream is far larger than what blocks add to it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.compensation.projections import Projection, find_projections
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.model.decoder import Decoder
from tests.engine.architectures import ROWS

FITTED = [name for name in ROWS if name != "gemma4"]  # refused


def found_in(model: PreTrainedModel) -> dict[str, Projection | str]:
    return {str(block): found for block, found in find_projections(Decoder(model)).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", FITTED)
def test_rounding_hides_no_projection(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    expected, found = found_in(row.model()), found_in(row.model().to(dtype))
    stages = [Stages.of(Decoder(model), Mask()).all for model in (row.model(), row.model().to(dtype))]
    assert stages[0] == stages[1]
    assert found.keys() == expected.keys()
    for block, one in expected.items():
        other = found[block]
        assert isinstance(one, str) == isinstance(other, str), (block, one, other)
        if isinstance(one, Projection) and isinstance(other, Projection):
            assert other.name == one.name
            assert other.scale == pytest.approx(one.scale, rel=0.02)
            if one.gain is not None:
                assert other.gain is not None
                assert (other.gain - one.gain).norm() < 0.05 * one.gain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_stream_with_outliers_hides_no_projection(dtype: torch.dtype) -> None:
    """As those of real models, in which a few channels are a thousand times as large as what a block adds."""
    model = ROWS["llama"].model().to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] += 3000
    assert all(isinstance(found, Projection) and found.scale == 1.0 for found in found_in(model).values())
    assert all(len(stage) == 1 for stage in Stages.of(Decoder(model), Mask()).all)
