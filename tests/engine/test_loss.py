"""Losses against other people's formulas, in any number of parts."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from blockpruner.engine import losses
from blockpruner.engine.losses import token_js, token_kl, token_nll


@pytest.fixture(params=[1, 2**30], ids=["token by token", "at once"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CACHED_BYTES", request.param)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.usefixtures("parts")
def test_js_is_scipys_squared_distance_for_every_token() -> None:
    mine, dense = logits(0, 2, 3, 50), logits(1, 2, 3, 50)
    p, q = (softmax(values.numpy(), axis=-1) for values in (dense, mine))
    assert np.allclose(token_js(mine, dense).numpy(), jensenshannon(p, q, axis=-1) ** 2, rtol=1e-9)


@pytest.mark.usefixtures("parts")
def test_kl_is_scipys_relative_entropy_of_the_dense_distribution() -> None:
    mine, dense = logits(0, 2, 3, 50), logits(1, 2, 3, 50)
    p, q = (softmax(values.numpy(), axis=-1) for values in (dense, mine))
    assert np.allclose(token_kl(mine, dense).numpy(), rel_entr(p, q).sum(-1), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_nll_of_a_token_is_the_same_bits_in_any_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets = logits(0, 3, 40, 700).to(dtype), torch.arange(120).view(3, 40)
    found = []
    for size in (1, 10_000, 2**30):
        monkeypatch.setattr(losses, "CACHED_BYTES", size)
        found.append(token_nll(values, targets))
    assert all(torch.equal(one, found[0]) for one in found)
    plain = -torch.log_softmax(values.double(), -1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(found[0].double(), plain, rtol=1e-5 if dtype != torch.float64 else 1e-12)
