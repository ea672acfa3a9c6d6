"""Take one family through all that is promised: the check at loading, scores, checkpoints. What only a fresh process
can tell (loading without this project, generation) is looked at for many families at once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.blocks import Granularity, Kind, Mask
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.loading import load_model, meta_model
from blockpruner.engine.model.rehearsal import rehearse
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.probe import is_batch_invariant
from blockpruner.engine.scoring.scorer import LocalScorer, UnitResult
from blockpruner.engine.scoring.scoring import ScoringReplica
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.units import WorkUnit, kernel_shape, split_work, window_groups, windows_per_row
from tests.families.configs import LAYERS, OPTIONS, VOCABULARY, make_config
from tests.families.fresh import brief
from tests.families.reference import Blocks, Reference

CPU = torch.device("cpu")
CALL_SHAPES = [
    CallShape(sequences_per_call=5, tokens_per_head_call=7),
    CallShape(sequences_per_call=64, tokens_per_head_call=512),
]
KEPT_VALUES = ("A_log", "dt_bias", ".D", "inv_freq", "lambda_q", "lambda_k", "rotary", "embed_positions")
"""Parameters that cannot be any number."""
CLOSE = 1e-5
UNITS = ((48, 5), (33, 9), (61, 4))
"""Tokens and number of windows: a size at which work is split, and sizes at which some gave other bits in other company
before it was not."""
MOST_PARAMETERS = 20_000_000


@dataclass
class Found:
    family: str
    state: str = ""
    """"right", "refused", "wrong", "traceback", or "not testable"."""
    why: str = ""
    notes: list[str] = field(default_factory=list)
    mixers: str = ""
    folders: list[Path] = field(default_factory=list)

    def ends(self, state: str, why: object) -> Found:
        if self.state in ("", "right"):
            self.state, self.why = state, brief(why) if isinstance(why, Exception) else str(why)
        return self


def make_model(config: PreTrainedConfig, shaken: tuple[str, ...] = ()) -> PreTrainedModel:
    """A random model in which all blocks, norms and biases matter."""
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the configuration is not tiny: {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            is_free = name in parameters or "bias" in name or any(part in name for part in shaken)
            if weight.is_floating_point() and is_free and not any(part in name for part in KEPT_VALUES):
                weight.add_(torch.randn_like(weight) * 0.12)
    return model.eval()


def check_family(name: str, work: Path) -> Found:
    found = Found(name)
    folder = work / "".join(letter if letter.isalnum() else "_" for letter in name)
    shutil.rmtree(folder, ignore_errors=True)
    dense = folder / "dense"
    dense.mkdir(parents=True)
    try:
        model = make_model(make_config(name), tuple(OPTIONS.get(name, {}).get("+buffers", ())))
        model.save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        windows = torch.randint(20, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            if not torch.isfinite(model(input_ids=windows, use_cache=False).logits).all():
                return found.ends("not testable", "its logits are not finite")
    except Exception as error:
        return found.ends("not testable", error)
    source = ModelSource(str(dense))
    try:
        skeleton = meta_model(source, "float32")
        shape = Decoder(skeleton).shape
        planned = _refusal(lambda: rehearse(skeleton, source))
        decoder = load_decoder(source, "float32", Placement.RESIDENT, [CPU])
        check_removable(decoder)
        found.mixers = ", ".join(dict.fromkeys(shape.mixer(layer) or "none" for layer in range(shape.num_layers)))
        _check_scores(found, decoder, Reference(model, _layers(model, decoder)), source, windows)
        _check_units(found, decoder)
        for number, mask in enumerate(_to_prune(decoder)):
            _write(found, folder / f"pruned_{number}", mask, source, windows)
        if planned:
            found.ends("wrong", f"`plan` refuses what `search` and `prune` take: {planned}")
    except UserError as refusal:
        return found.ends("refused", str(refusal).replace(str(work), ""))
    except Exception as error:
        return found.ends("traceback", error)
    found.folders.insert(0, dense)
    return found.ends("right", "")


def _refusal(work: Any) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def _layers(model: PreTrainedModel, decoder: Decoder) -> list[Any]:
    return list(model.get_submodule(decoder.architecture.layers))


def _existing(text: str, decoder: Decoder) -> Mask:
    return Mask(Mask.parse(text).absent - decoder.shape.missing - decoder.shape.needed)


def _to_score(decoder: Decoder) -> list[Mask]:
    last = LAYERS - 1
    texts = ["mha.0+mlp.0", f"mha.0+mha.1+mlp.{last - 1}", f"mha.1+mlp.1+mha.{last}+mlp.{last}"]
    texts += ["+".join(f"mlp.{layer}" for layer in range(LAYERS)), "mha.0+mha.2+mha.3+mlp.1"]
    singles = [Mask().without(block) for block in decoder.shape.candidates(Granularity.MIX)]
    return list(dict.fromkeys([Mask(), *singles, *(_existing(text, decoder) for text in texts)]))


def _to_prune(decoder: Decoder) -> list[Mask]:
    """Masks that leave a mixer with positions; one takes all others, one leaves that alone."""
    shape = decoder.shape
    mixers = shape.candidates(Granularity.MHA)
    alone = [block for block in mixers if block != shape.last_mixers[-1]]
    masks = [_existing(text, decoder) for text in ("mha.0+mlp.2", "mha.0+mlp.1+mha.2+mlp.3")]
    masks += [Mask.of(alone), Mask.of([*alone, *shape.candidates(Granularity.MLP)])]
    others = [block for block in mixers if block not in shape.last_mixers]
    masks += [Mask.of(others)] if others else []
    usable = [mask for mask in dict.fromkeys(masks) if not mask.absent.issuperset(shape.last_mixers) and mask.absent]
    return usable


def _blocks(mask: Mask) -> Blocks:
    return frozenset((str(block.kind), block.layer) for block in mask.absent)


def _check_scores(found: Found, decoder: Decoder, reference: Reference, source: ModelSource, windows: Tensor) -> None:
    masks = _to_score(decoder)
    expected = [reference.sums(_blocks(mask), windows) for mask in masks]
    for mask in masks:
        for block in mask.absent:
            if not reference.modules("mha" if block.kind is Kind.MHA else "mlp", block.layer):
                found.ends("wrong", f"the reference knows no {block}")
                return
    streamed = load_decoder(source, "float32", Placement.STREAMED, [CPU])
    sums = [ForkedPass(decoder, shape).window_sums(masks, windows).tolist() for shape in CALL_SHAPES]
    sums.append(ForkedPass(streamed, CALL_SHAPES[0]).window_sums(masks, windows).tolist())
    for of_shape in sums:
        for mask, one, other in zip(masks, of_shape, expected, strict=True):
            off = max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
            if not off < CLOSE:
                found.ends("wrong", f"the score of {mask} is off by {off:.1e}")


def _check_units(found: Found, decoder: Decoder) -> None:
    """Check that splitting the work for several replicas does not change bits. What a search does not split (of models
    that route tokens or carry states) has the same units, and nothing to compute."""
    shape = decoder.shape
    masks = [Mask(), *(Mask().without(block) for block in shape.candidates(Granularity.MIX))]
    for seq_len, num_windows in UNITS:
        windows = torch.randint(
            20, VOCABULARY, (num_windows, seq_len), generator=torch.Generator().manual_seed(seq_len)
        )
        scorer = LocalScorer(ScoringReplica(decoder, windows))
        kernel = kernel_shape(shape, seq_len=seq_len, num_windows=num_windows, bytes_per_value=4, threads=1)
        probed = is_batch_invariant(scorer, shape, kernel, num_windows=num_windows, seq_len=seq_len)
        assert isinstance(probed, bool)
        one, three = (
            split_work(
                masks, shape, replace(kernel, batch_invariant=probed), seq_len=seq_len, num_replicas=number,
                groups=window_groups(num_windows, windows_per_row(seq_len)),
            )
            for number in (1, 3)
        )  # fmt: skip
        if one != three and _sums(scorer, one) != _sums(scorer, three):
            found.ends("wrong", f"three replicas give other bits than one (windows of {seq_len} tokens)")


def _sums(scorer: LocalScorer, units: list[WorkUnit]) -> dict[tuple[Mask, int], float]:
    sums: dict[tuple[Mask, int], float] = {}
    for result in scorer.run(units):
        assert isinstance(result, UnitResult)
        places = ((mask, window) for mask in result.unit.masks for window in range(result.unit.first, result.unit.stop))
        sums |= dict(zip(places, (value for row in result.value for value in row), strict=True))
    return sums


def _write(found: Found, folder: Path, mask: Mask, source: ModelSource, windows: Tensor) -> None:
    dense = load_model(source, "float32")
    decoder = Decoder(dense)
    pruned = prune(dense, mask)
    check_cache(pruned)
    reference = Reference(dense, _layers(dense, decoder))
    logits = torch.stack([reference.logits(_blocks(mask), window) for window in windows])
    folder.mkdir()
    write_grouped(pruned, None, {"format": "grouped"}, folder)
    again = load_model(ModelSource(str(folder)), "float32")
    with torch.inference_mode():
        for which in (pruned, again):
            found_logits = which(input_ids=windows, use_cache=False).logits
            off = ((found_logits - logits).abs().max() / logits.abs().max()).item()
            if not off < 1e-4:
                found.ends("wrong", f"logits without {mask} are off by {off:.1e}")
    torch.save({"windows": windows, "logits": logits}, folder / "expected.pt")
    found.folders.append(folder)
