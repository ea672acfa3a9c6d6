"""Compensation: the fits are the least squares that they claim to be, in every family and placement."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.compensation.fitting import NO_COST, Fitting, Trial, parts_of
from blockpruner.engine.compensation.least_squares import Sums, solve
from blockpruner.engine.compensation.methods.both import Both
from blockpruner.engine.compensation.methods.fold import Fold
from blockpruner.engine.compensation.methods.refit import Refit
from blockpruner.engine.compensation.projections import Projection
from blockpruner.engine.compensation.replica import CompensationReplica
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.compensation.surgery import put_changed, weights_of
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.reference import plain_window_sum
from blockpruner.engine.scoring.scorer import LocalScorer
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from tests.conftest import random_windows, tiny_llama
from tests.engine.architectures import ROWS, SOME_ROWS
from tests.engine.test_architectures import windows
from tests.engine.test_narrower import order_of

MASK = Mask.parse("mha.1+mlp.2")
REFIT, FOLD, BOTH = (Trial(method, 1e-2) for method in (Refit(), Fold(), Both()))


def fitting(decoder: Decoder, text: Tensor, mask: Mask, *trials: Trial, tokens_per_call: int = 40) -> Fitting:
    replica = CompensationReplica(decoder, text, mask, tokens_per_call)
    stages = replica.stages.to_fit
    weights = weights_of(prune(decoder.model, mask), stages, decoder.architecture.layers)
    parts = parts_of(len(text))
    return Fitting(LocalScorer(replica), stages, weights, trials, parts, NO_COST)


def fitted(given: Fitting) -> list[Changed]:
    changes: list[dict] = [{} for _ in given.trials]
    for _, some in given.fit({}):
        for all_, found in zip(changes, some, strict=True):
            all_ |= found
    return list(changes)


def equal(one: Changed, other: Changed) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[block].weight, other[block].weight)
        and (one[block].bias is None or torch.equal(one[block].bias, other[block].bias))
        for block in one
    )


def test_a_fit_is_numpys_least_squares() -> None:
    """The MLP before an absent attention, by hand: weighted rows, the ridge as rows of its own, numpy's lstsq."""
    model, text, mask = tiny_llama(), random_windows(12), Mask.parse("mha.2")
    block = Block(Kind.MLP, 1)
    seen: dict[str, Tensor] = {}
    layers = model.model.layers
    handles = [
        layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: seen.update(inner=a[0])),
        layers[2].register_forward_pre_hook(lambda m, a, k: seen.update(before=a[0]), with_kwargs=True),
        layers[2].self_attn.register_forward_hook(lambda m, a, o: seen.update(gap=o[0])),
    ]
    with torch.no_grad():
        model(input_ids=text)
    for handle in handles:
        handle.remove()
    inner, gap = (seen[name].flatten(0, 1).numpy() for name in ("inner", "gap"))
    after = gap + seen["before"].flatten(0, 1).numpy()
    rows = 1 / np.sqrt((after**2).mean(1, keepdims=True))
    left, right = rows * inner, rows * gap
    penalty = np.sqrt(1e-2 * (left**2).sum(0).mean())
    left = np.vstack([left, penalty * np.eye(left.shape[1])])
    right = np.vstack([right, np.zeros((inner.shape[1], gap.shape[1]))])
    expected, *_ = np.linalg.lstsq(left, right, rcond=None)

    (found,) = fitted(fitting(Decoder(model), text, mask, FOLD))
    change = found[block].weight - layers[1].mlp.down_proj.weight
    assert list(found) == [block]
    np.testing.assert_allclose(change.detach().numpy(), expected.T, rtol=1e-9, atol=1e-12)


def test_a_gap_that_is_linear_in_its_neighbours_input_is_given_back_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks below share something between two layers, which the check at loading refuses."""
    monkeypatch.setattr("blockpruner.engine.compensation.replica.check_removable", lambda decoder: None)
    model, text, mask = tiny_llama(), random_windows(12), Mask.parse("mha.2")
    layers = model.model.layers
    link = torch.randn(model.config.hidden_size, model.config.intermediate_size, dtype=torch.float64) / 8
    held: list[Tensor] = []
    layers[1].mlp.down_proj.register_forward_hook(lambda m, a, o: held.append(a[0]))
    layers[2].self_attn.o_proj.register_forward_hook(lambda m, a, o: nn.functional.linear(held[-1], link))
    before = [plain_window_sum(model, window) for window in text]
    for trial in (Trial(Fold(), 0.0), Trial(Refit(), 0.0), Trial(Both(), 0.0)):
        given = fitting(Decoder(model), text, mask, trial, tokens_per_call=16)
        (found,) = fitted(given)
        torch.testing.assert_close(
            found[Block(Kind.MLP, 1)].weight, layers[1].mlp.down_proj.weight + link, rtol=1e-7, atol=1e-8
        )
        assert given.losses(found, "", [(0, len(text))]) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("name", [row for row in SOME_ROWS if row.values[0] != "gemma4"])  # refused: see test_rest.py
def test_every_family_is_fitted_and_its_checkpoint_has_the_loss_of_the_fit(name: str) -> None:
    """And a refit with next to no ridge leads the last stream closer to the dense model's."""
    row = ROWS[name]
    model, text = row.model(), windows(8)
    given = fitting(Decoder(model), text, MASK, Trial(Refit(), 1e-9), FOLD, BOTH)
    pruned = prune(model, MASK)
    plain = [plain_window_sum(pruned, window) for window in text]
    exact = max(row.tolerance, 1e-13)
    assert given.losses({}, "", [(0, 8)]) == pytest.approx(plain, rel=exact)
    compensated = []
    for found in fitted(given):
        assert found
        compensated.append(prune(model, MASK))
        put_changed(compensated[-1], given.stages, Decoder(model).architecture.layers, found)
        changed = [plain_window_sum(compensated[-1], window) for window in text]
        assert changed != plain
        assert given.losses(found, "", [(0, 8)]) == pytest.approx(changed, rel=exact)
    assert [plain_window_sum(pruned, window) for window in text] == plain, "the dense weights stay"

    def last(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of(input_ids=text, output_hidden_states=True, use_cache=False).hidden_states[-1]

    dense = last(model)
    assert (last(compensated[0]) - dense).norm() < (last(pruned) - dense).norm()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "cohere", "mixtral"])
def test_all_placements_fit_the_same_bits(name: str, tmp_path: Path) -> None:
    ROWS[name].model().to(torch.bfloat16).save_pretrained(tmp_path)

    def fit(placement: Placement, num_devices: int) -> list[Changed]:
        devices = [torch.device("cpu")] * num_devices
        decoder = load_decoder(ModelSource(str(tmp_path)), "float32", placement, devices)
        replica = CompensationReplica(decoder, windows(8), MASK, 40)
        plain = load_decoder(ModelSource(str(tmp_path)), "float32", Placement.RESIDENT, devices[:1])
        weights = weights_of(prune(plain.model, MASK), replica.stages.to_fit, plain.architecture.layers)
        return fitted(
            Fitting(LocalScorer(replica), replica.stages.to_fit, weights, [REFIT, FOLD, BOTH], parts_of(8), NO_COST)
        )

    resident = fit(Placement.RESIDENT, 1)
    for other in (fit(Placement.STREAMED, 1), fit(Placement.SHARDED, 3)):
        assert all(equal(one, two) for one, two in zip(resident, other, strict=True))


def test_all_placements_fit_narrower_blocks_to_the_same_bits(tmp_path: Path) -> None:
    tiny_llama(torch.float32).save_pretrained(tmp_path)
    mask = Mask.parse("mha.1+mlp.1/4+mlp.1/3+mha.2/2+mlp.3/4")

    def fit(placement: Placement, num_devices: int) -> list[Changed]:
        devices = [torch.device("cpu")] * num_devices
        decoder = load_decoder(ModelSource(str(tmp_path)), "float32", placement, devices)
        kept = order_of(decoder)
        replica = CompensationReplica(
            decoder, windows(8), mask, 40, kept=kept, on_device=placement is not Placement.STREAMED
        )
        plain = load_decoder(ModelSource(str(tmp_path)), "float32", Placement.RESIDENT, devices[:1])
        weights = weights_of(prune(plain.model, mask, kept), replica.stages.to_fit, plain.architecture.layers)
        return fitted(Fitting(LocalScorer(replica), replica.stages.to_fit, weights, [BOTH], parts_of(8), NO_COST))

    resident = fit(Placement.RESIDENT, 1)
    assert Block(Kind.MLP, 1) in resident[0]
    for other in (fit(Placement.STREAMED, 1), fit(Placement.SHARDED, 3)):
        assert all(equal(one, two) for one, two in zip(resident, other, strict=True))


def test_a_replica_that_lost_its_streams_gets_the_same_bits() -> None:
    model, text = tiny_llama(torch.float32, num_hidden_layers=6), random_windows(16)
    mask = Mask.parse("mha.1+mlp.3+mha.4")
    whole = fitted(fitting(Decoder(model), text, mask, REFIT, BOTH))
    given = fitting(Decoder(model), text, mask, REFIT, BOTH)
    replica = given.scorer._replica
    changes: list[dict] = [{}, {}]
    old: list[tuple[object, object]] = []
    for number, (_, some) in enumerate(given.fit({})):
        for all_, found in zip(changes, some, strict=True):
            all_ |= found
        home = next(iter(replica._parts))
        if number == 0:
            old.append((home, copy.deepcopy(replica._parts[home])))
        elif number == 3:  # the part was elsewhere meanwhile, and comes back to where it was some stages ago
            replica._parts.update(old)  # type: ignore[arg-type]
        else:
            replica._parts.pop(home)  # it goes on at another replica
    assert all(equal(one, two) for one, two in zip(whole, changes, strict=True))


def test_a_fit_that_goes_on_from_known_stages_gets_the_same_bits() -> None:
    model, text = tiny_llama(torch.float32, num_hidden_layers=6), random_windows(16)
    mask = Mask.parse("mha.1+mlp.3+mha.4")
    whole = [(stage.number, some) for stage, some in fitting(Decoder(model), text, mask, REFIT, FOLD).fit({})]
    for num_known in (1, 3):
        again = list(fitting(Decoder(model), text, mask, REFIT, FOLD).fit(dict(whole[:num_known])))
        for (_, some), (_, others) in zip(whole, again, strict=True):
            assert all(equal(one, two) for one, two in zip(some, others, strict=True))


def test_blocks_side_by_side_are_fitted_together() -> None:
    stages = Stages.of(Decoder(ROWS["gpt_neox parallel"].model()), MASK)
    assert [stage.blocks for stage in stages.to_fit] == [
        (Block(Kind.MLP, 1),),  # it reads what the absent attention read
        (Block(Kind.MHA, 2),),
        (Block(Kind.MHA, 3), Block(Kind.MLP, 3)),
    ]


def test_what_cannot_be_fitted_is_named_with_its_reason() -> None:
    stages = Stages.of(Decoder(ROWS["mixtral"].model()), MASK)
    assert {block.kind for block in stages.reasons} == {Kind.MLP}
    assert all(isinstance(one, Projection) for one in stages.projections.values())
    only_experts = Mask.parse("mha.0+mha.1+mha.2+mha.3")
    with pytest.raises(UserError, match="'mixtral' cannot be compensated"):
        Stages.of(Decoder(ROWS["mixtral"].model()), only_experts)


def test_sums_over_parts_are_the_sums_over_all_and_infinity_is_refused() -> None:
    inputs, residual = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    weights = torch.rand(20, dtype=torch.float64)
    whole = Sums.of(inputs, residual, weights)
    parts = Sums.of(inputs[:7], residual[:7], weights[:7]) + Sums.of(inputs[7:], residual[7:], weights[7:])
    torch.testing.assert_close(whole.gram, parts.gram)
    torch.testing.assert_close(solve(whole, 0.1), solve(parts, 0.1))
    with pytest.raises(SearchFailed, match="not finite"):
        solve(Sums(whole.gram, whole.cross * float("inf")), 0.1)


def test_without_a_ridge_more_inputs_than_tokens_give_the_smallest_change() -> None:
    inputs, residual = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    change = solve(Sums.of(inputs, residual, torch.ones(4)), 0.0)
    expected = torch.linalg.lstsq(inputs, residual, driver="gelsd").solution.T
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-7)
