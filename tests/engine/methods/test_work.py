"""The work that methods record, against PyTorch's own count of what they ran."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import blockpruner.engine.methods.prune_and_comp as prune_and_comp_module
import blockpruner.engine.methods.replaceme as replaceme_module
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.methods.fewer_layers import plain_projections
from blockpruner.engine.methods.laco import Collapse, laco
from blockpruner.engine.methods.prune_and_comp import prune_and_comp
from blockpruner.engine.methods.ranking import Measured, rank
from blockpruner.engine.methods.replaceme import replaceme
from blockpruner.engine.methods.slicegpt import slicegpt
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from tests.conftest import TINY, random_windows, tiny_llama

NUM_WINDOWS, SEQ_LEN = 20, 12


def counted(run: Callable[[], int]) -> tuple[int, float]:
    """What it says, and PyTorch's count with the causal half of attention's products."""
    with FlopCounterMode(display=False) as counter:
        said = run()
    by_operation = counter.get_flop_counts()["Global"]
    products = by_operation.get(torch.ops.aten.bmm, 0)  # eager attention: everything else is `mm` or `addmm`
    return said, sum(by_operation.values()) - products / 2


def parallel() -> PreTrainedModel:
    sizes = {name: size for name, size in TINY.items() if name != "num_key_value_heads"}
    config = GPTNeoXConfig(**sizes, use_parallel_residual=True, attn_implementation="eager")
    return GPTNeoXForCausalLM(config).double().eval()


MODELS = {"one after the other": lambda: tiny_llama(attn_implementation="eager"), "parallel": parallel}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("granularity", [Granularity.LAYER, Granularity.MIX])
def test_of_a_ranking(model: str, again: bool, granularity: Granularity) -> None:
    decoder = Decoder(MODELS[model]())
    space = SearchSpace(shape=decoder.shape, blocks=granularity, budget=Budget(num_remove=3))
    windows = random_windows(NUM_WINDOWS, SEQ_LEN)
    decoder.embed(windows[:1])  # sees the arguments of layers once for all

    def measure(mask: Mask) -> Measured:
        found = measure_influence(decoder, windows, mask=mask, layers_only=granularity is Granularity.LAYER)
        return Measured(found.block_influence, found.work_flops)

    def run() -> int:
        return list(rank(space, "block influence", measure, again=again))[-1].work_flops

    said, seen = counted(run)
    assert said == pytest.approx(seen, rel=0.01)


def test_of_laco() -> None:
    model = tiny_llama(attn_implementation="eager")

    def run() -> int:
        return laco(model, random_windows(3, SEQ_LEN), num_remove=2, collapse=Collapse(num_merged=2)).work_flops

    said, seen = counted(run)
    assert said == pytest.approx(seen, rel=0.01)


def test_of_slicegpt() -> None:
    model = tiny_llama(attn_implementation="eager")
    said, seen = counted(lambda: slicegpt(model, random_windows(NUM_WINDOWS, SEQ_LEN), sparsity=0.25).work_flops)
    assert said == pytest.approx(seen, rel=0.01)


def test_of_replaceme_and_prune_and_comp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the few tokens that show where output projections are."""
    decoder, windows = Decoder(tiny_llama(attn_implementation="eager")), random_windows(NUM_WINDOWS, SEQ_LEN)
    decoder.embed(windows[:1])
    known = plain_projections(decoder)
    for module, method in ((replaceme_module, replaceme), (prune_and_comp_module, prune_and_comp)):
        monkeypatch.setattr(module, "plain_projections", lambda *arguments: known)
        said, seen = counted(lambda method=method: method(decoder, windows, num_remove=2).work_flops)
        assert said == pytest.approx(seen, rel=0.02)
