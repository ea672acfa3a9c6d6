"""The Python API: the functions that `import blockpruner` offers (docs/python.md).

Models and texts are live objects or names. Nothing is printed unless `verbose=True`. What a caller can get wrong raises
`UserError` with the message that the command line shows; Ctrl-C raises KeyboardInterrupt and leaves a run resumable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.calibration import Windows, calibration_windows, evaluation_windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.checkpoint.grouped import write_grouped
from blockpruner.engine.checkpoint.provenance import base_of, what_was_removed
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.method import Method
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.identity import Identity, identity, identity_in_memory
from blockpruner.engine.model.loading import dtype_to_write, load_model, load_tokenizer, materialize, resolve_dtype
from blockpruner.engine.model.multimodal import is_multimodal
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.model.surgery import check_cache, kept_channels
from blockpruner.engine.model.surgery import prune as take_out
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.sections import Calibration, ModelSource, Precision
from blockpruner.files import new_folder
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import Removals, read_order, read_removals
from blockpruner.searching.records import StepRecord
from blockpruner.searching.resolving import Given
from blockpruner.searching.result import SearchResult
from blockpruner.searching.sequence import order_beside, read_official_sequence
from blockpruner.showing.console import Reporter
from blockpruner.showing.libraries import libraries_quiet

Model: TypeAlias = PreTrainedModel | str | Path
"""A transformers model in memory, or its name: a Hugging Face id, a folder, a .gguf file, `smollm2`."""
Text: TypeAlias = str | Path | Sequence[str | Path]
"""The name of a text (alpaca, wikitext2, builtin, a file or a folder), or several."""
Result = dict[str, Any]
"""What the command of the same name prints with `--json`."""

_provenance: WeakKeyDictionary[PreTrainedModel, dict[str, Any]] = WeakKeyDictionary()
"""What `save` writes beside the weights of models that `prune` returned."""
_kept: WeakKeyDictionary[PreTrainedModel, ChannelOrder] = WeakKeyDictionary()
"""The channels and heads that the narrower blocks of such models have."""


def load(
    name: str | Path, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by name: a Hugging Face id, a folder, a .gguf file, or `smollm2`. On the CPU; `auto` is
    bfloat16 if the processor has instructions for it, else float32. Of a multimodal model it is the text decoder."""
    source = ModelSource(str(name), revision, trust_remote_code)
    chosen, _ = resolve_dtype(Precision.of(dtype=dtype).dtype, source, torch.device("cpu"))
    with libraries_quiet():
        made = materialize(source, chosen)
        return load_model(made, chosen), load_tokenizer(made)


def calibration(text: Text, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Windows:
    """Calibration windows, drawn as the official code draws them.

    text: alpaca, wikitext2, builtin, a file or a folder; or several, which give equal numbers of windows. options:
    num_samples=256, seq_len=2048, num_windows=None, seed=42, text_column="text", chat_template="auto", bos="auto".
    """
    return calibration_windows(Calibration(calibration=_texts(text), **options), tokenizer)


def test_text(
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 2048,
    num_windows: int | None = None,
    text_column: str = "text",
    chat_template: str = "auto",
    bos: str = "auto",
) -> Windows:
    """All windows of a text to judge by: `wikitext2` means its test split."""
    chosen = Calibration.of(seq_len=seq_len, chat_template=chat_template, bos=bos)
    found = evaluation_windows(
        str(text), tokenizer, seq_len=seq_len, text_column=text_column, chat_template=chosen.chat_template,
        bos=chosen.bos,
    )  # fmt: skip
    return Windows(found.tokens[:num_windows], found.num_rows)


test_text.__test__ = False  # type: ignore[attr-defined] # pytest must not take it for a test


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """exp of the mean over windows of the mean token NLL; NaN if a window's loss is not finite."""
    with _as_it_was(model):
        return evaluate_perplexity(model.eval(), windows.tokens).value


def search(
    model: Model,
    text: Windows | Text,
    *,
    num_remove: int | None = None,
    ratio: float | None = None,
    strategy: str | Strategy = "greedy",
    metric: str | Metric = "ppl",
    out: str | Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    verbose: bool = False,
    **options: Any,
) -> SearchResult:
    """Find the order in which blocks can be removed.

    model: in memory, then it is searched in this process; or a name, then replicas are loaded as `replicas`, `address`
    and the other options of the command say. text: windows from `calibration`, or the name of a text. num_remove,
    ratio: how much to remove. out: run directory, with which the same call resumes; None: nothing is kept. on_step:
    called after each removal; the step prints as one line. options: those of `blockpruner search`, with underscores,
    such as blocks="layer" or tolerance="1se" for strategy="lazy".
    """
    flat: dict[str, Any] = {
        "num_remove": num_remove, "ratio": ratio, "strategy": strategy, "metric": metric, **options,
    }  # fmt: skip
    windows = None
    if not isinstance(text, Windows):
        flat["calibration"] = _texts(text)
    else:
        windows = text
        made_of = windows.made_of or Calibration(calibration=("windows in memory",), seq_len=windows.seq_len)
        flat |= dict(made_of)
        flat |= {name: options[name] for name in ("seed",) if name in options}
    live = model if isinstance(model, PreTrainedModel) else None
    if live is not None:
        _check_live(live, windows, options)
        flat |= {"model": _name(live), "no_ray": True, "replicas": None}
    else:
        flat["model"] = str(model)
    config = SearchConfig.of(**flat)
    told = on_step or (lambda step: None)
    with libraries_quiet(), _as_it_was(live), _run_directory(out) as run:
        given = Given(None if live is None else Decoder(live), windows)
        summary = run_search(config, run, _reporter(verbose), given=given, on_step=told)
        channels = read_order(run, summary)
    return SearchResult(summary, None if out is None else run, channels)


def prune(
    model: Model,
    found: SearchResult | Mask | Sequence[str | Block] | str | Path,
    *,
    num_remove: int | None = None,
    channels: ChannelOrder | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model without blocks. Of a model in memory it shares the weights.

    found: what `search` found; or a run directory or a removal order in the official format; or blocks, such as
    ["mha.3", "mlp.7"]. num_remove: only the first N of them. channels: which channels and heads the groups among given
    blocks are, such as ["mlp.7/4"]: `SearchResult.channels`. dtype, revision, trust_remote_code: to load a model by its
    name; auto is the dtype in which it is stored, or for a GGUF the search's. Raises UserError if removing blocks has
    no clear meaning for the model, or if it then could not generate with a KV cache.
    """
    order, recorded, searched, revision = _order(model, found, revision, trust_remote_code)
    if channels is not None and recorded is not None:
        raise UserError("expected `channels` beside blocks, got it beside a search, which has its own.")
    channels = channels or recorded
    base = _identity(model, revision, trust_remote_code)
    if num_remove is not None and not 1 <= num_remove <= len(order):
        raise UserError(f"expected `num_remove` from 1 to {len(order)}, got {num_remove}.")
    order = order[:num_remove]
    if isinstance(model, PreTrainedModel):
        _check_no_other_parts(model)
        dense = model
    else:
        chosen, _ = dtype_to_write(dtype, ModelSource(str(model), revision, trust_remote_code), searched)
        dense, _ = load(model, dtype=chosen, revision=revision, trust_remote_code=trust_remote_code)
    with _as_it_was(dense):
        decoder = Decoder(dense)
        check_removable(decoder)
        shape, mask = decoder.shape, Mask.of(order)
        if mask.lacking:
            check_narrowable(decoder, tuple({block.kind for block in mask.lacking}))
        small = take_out(dense, mask, channels)
        check_cache(small)
        _kept[small] = kept_channels(decoder, mask, channels)
    whole_type = getattr(dense, "multimodal_type", None)
    _provenance[small] = {
        "format": "grouped",
        **base_of(base, revision),
        **({"multimodal": whole_type} if whole_type else {}),
        "dtype": str(small.dtype).removeprefix("torch."),
        **what_was_removed(shape, order, small.num_parameters()),
        "blockpruner": version("blockpruner"),
    }
    return small


def compensate(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    text: Windows,
    *,
    method: str | Method = "auto",
    ridge: float | None = None,
    verbose: bool = False,
) -> PreTrainedModel:
    """A pruned model whose remaining blocks make up for the removed ones: least squares on their output projections.

    model: from `prune`; it stays as it is. dense: the model that it was made from. text: windows from `calibration`;
    every eighth is held out to choose the method and the ridge by, and if nothing lowers the loss on those, nothing is
    changed. method: auto, fold, refit or both (docs/compensation.md). ridge: None to choose one.
    """
    from blockpruner.compensating.in_memory import compensate_in_memory

    fit = Fit.of(method=method, ridge=ridge)
    with libraries_quiet(), _as_it_was(dense):
        made, found = compensate_in_memory(model, dense, text, fit, _reporter(verbose), _kept.get(model))
    if model in _provenance:
        _kept[made] = _kept[model]
        _provenance[made] = {**_provenance[model], "compensation": found.to_json(text)}
    return made


def compensate_folder(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Compensate a checkpoint that `prune` wrote, on as many replicas as fit. The same call resumes what was stopped.

    options: those of `blockpruner compensate`, such as calibration="alpaca", seq_len=512, perplexity=("wikitext2",).
    """
    from blockpruner.compensating.compensating import compensate_checkpoint
    from blockpruner.compensating.config import CompensateConfig

    with libraries_quiet():
        config = CompensateConfig.of(folder=Path(_named(folder)), **options)
        return compensate_checkpoint(config, Path(out), _reporter(verbose))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> Path:
    """Write a model that `prune` returned to a new folder. It loads with transformers' `from_pretrained` and
    `trust_remote_code=True`, or, after `import blockpruner.checkpoints`, without."""
    if model not in _provenance:
        raise UserError(
            f"expected a model that blockpruner.prune returned, got a {type(model).__name__}; save others with their "
            f"own save_pretrained."
        )
    with libraries_quiet(), new_folder(Path(folder)) as aside:
        write_grouped(model, tokenizer, _provenance[model], aside, kept=_kept[model])
    return Path(folder)


def evaluate(
    model: Model,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    verbose: bool = False,
    **options: Any,
) -> Result:
    """Task scores of lm-eval, and perplexity.

    model: in memory, with its tokenizer, then it is judged in this process; or a name. options: those of
    `blockpruner evaluate`, such as tasks=("piqa",), limit=100, perplexity=("wikitext2",), run="run".
    """
    from blockpruner.evaluating.config import EvaluationConfig
    from blockpruner.evaluating.evaluating import GivenModel, evaluate_model

    live = model if isinstance(model, PreTrainedModel) else None
    given = None
    if live is not None:
        if tokenizer is None:
            raise UserError("expected `tokenizer` beside a model in memory.")
        if out is not None or options.get("run") is not None:
            raise UserError("expected the name of a model with `out` or `run`, got a model in memory.")
        given = GivenModel(live, tokenizer)
        options = {**options, "no_ray": True}
    config = EvaluationConfig(model=_name(live) if live is not None else str(model), **options)
    with libraries_quiet(), _as_it_was(live):
        return evaluate_model(config, _reporter(verbose), out=None if out is None else Path(out), given=given)


def compare(model: str | Path, text: Text, *, out: str | Path, verbose: bool = False, **options: Any) -> Result:
    """Run several pruning methods on one model and calibration text, and compare what they leave.

    out: folder for all results; the same call goes on from there. options: those of `blockpruner compare`, such as
    methods=("blockpruner", "shortgpt"), ratio=(0.2,), perplexity=("wikitext2",).
    """
    from blockpruner.comparing.comparing import compare_methods
    from blockpruner.comparing.config import CompareConfig

    config = CompareConfig.of(model=_named(model), calibration=_texts(text), **options)
    with libraries_quiet():
        return compare_methods(config, Path(out), _reporter(verbose))


def shrink(model: str | Path, text: Text, *, out: str | Path, verbose: bool = False, **options: Any) -> Result:
    """The whole way from a model to a smaller one in `out / "model"`: search, prune, compensate, evaluate, measure the
    speed, report, export. The same call resumes what was stopped.

    options: those of `blockpruner shrink`, such as ratio=0.2, max_perplexity_increase=0.2, export=("deci",).
    """
    from blockpruner.shrinking.config import ShrinkConfig
    from blockpruner.shrinking.shrinking import shrink_model

    with libraries_quiet():
        config = ShrinkConfig.of(model=_named(model), calibration=_texts(text), **options)
        return shrink_model(config, Path(out), _reporter(verbose))


def plan(model: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Placement, memory and time of a search, from the model's config alone.

    options: those of `blockpruner plan`: a search's own, and gpus="2x24GB", nodes, tflops, measure.
    """
    from blockpruner.planning.config import PlanConfig
    from blockpruner.planning.planning import plan_search

    with libraries_quiet():
        return plan_search(PlanConfig.of(model=_named(model), **options), _reporter(verbose))


def sample(model: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Let a model write calibration text to a new .jsonl file.

    options: those of `blockpruner sample`, such as num_rows=96, num_tokens=256, start="<|endoftext|>".
    """
    from blockpruner.sampling.config import SampleConfig
    from blockpruner.sampling.sampling import sample_text

    with libraries_quiet():
        return sample_text(SampleConfig(model=_named(model), **options), Path(out), _reporter(verbose))


def latency(model: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """How fast a model generates, and its memory; a pruned checkpoint beside its dense model.

    options: those of `blockpruner latency`, such as repeats=20, prompt_len=512, num_tokens=128.
    """
    from blockpruner.timing.config import LatencyConfig
    from blockpruner.timing.timing import measure_latency

    with libraries_quiet():
        return measure_latency(LatencyConfig(model=_named(model), **options), _reporter(verbose))


def export(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Write a pruned checkpoint in the form that a runtime loads.

    options: those of `blockpruner export`, such as format="gguf", base="model.gguf".
    """
    from blockpruner.exporting.config import ExportConfig
    from blockpruner.exporting.exporting import export_model

    with libraries_quiet():
        return export_model(ExportConfig.of(folder=Path(_named(folder)), **options), Path(out), _reporter(verbose))


def recover(folder: str | Path, out: str | Path, *, verbose: bool = False, **options: Any) -> Result:
    """Train LoRA adapters for a pruned checkpoint, and merge them. The same call resumes what was stopped.

    options: those of `blockpruner recover`, such as data="alpaca", num_rows=8000, perplexity=("rest",).
    """
    from blockpruner.recovering.config import RecoverConfig
    from blockpruner.recovering.recovering import recover_model

    with libraries_quiet():
        return recover_model(RecoverConfig(folder=Path(_named(folder)), **options), Path(out), _reporter(verbose))


def report(
    runs: str | Path | Sequence[str | Path], *, out: str | Path | None = None, verbose: bool = False, **options: Any
) -> Result:
    """Draw a run, or several runs of one model over each other, as pictures and one HTML page.

    options: those of `blockpruner report`, such as influence=True.
    """
    from blockpruner.reporting.config import ReportConfig
    from blockpruner.reporting.writing import write_report

    several = [runs] if isinstance(runs, str | Path) else runs
    with libraries_quiet():
        return write_report(ReportConfig.of(runs=tuple(several), out=out, **options), _reporter(verbose))


def _reporter(verbose: bool) -> Reporter:
    return Reporter(Console(quiet=not verbose))


def _texts(text: Text) -> tuple[str, ...]:
    return (str(text),) if isinstance(text, str | Path) else tuple(map(str, text))


def _name(model: PreTrainedModel) -> str:
    """What a run records of a model in memory."""
    return model.config.name_or_path or f"{type(model).__name__} in memory"


def _named(model: Any) -> str:
    if isinstance(model, PreTrainedModel):
        raise UserError("expected the name or the folder of a model, got a model in memory; `save` it first.")
    return str(model)


def _check_live(model: PreTrainedModel, windows: Windows | None, options: dict[str, Any]) -> None:
    """Raise UserError for what a model in memory cannot do."""
    _check_no_other_parts(model)
    if windows is None:
        raise UserError(
            "expected windows from blockpruner.calibration beside a model in memory, got the name of a text."
        )
    elsewhere = [name for name in ("replicas", "address", "placement", "gpus_per_replica", "dtype", "device")
                 if name in options]  # fmt: skip
    if elsewhere:
        raise UserError(
            f"expected the name of a model with `{elsewhere[0]}`, got a model in memory, which is searched where it is."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError(
            "expected a model on one device, got one that is spread over several; search it by its name, with "
            "`placement` and `gpus_per_replica`."
        )


def _check_no_other_parts(model: PreTrainedModel) -> None:
    if is_multimodal(model.config):
        raise UserError(
            f"expected a language model, got a multimodal one of type {model.config.model_type!r} in memory; "
            f"blockpruner.load loads the text decoder of its folder."
        )


def _order(
    model: Model,
    found: SearchResult | Mask | Sequence[str | Block] | str | Path,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[list[Block], ChannelOrder | None, str | None, str | None]:
    """The blocks, the order of channels, the dtype of the search, and the revision.

    Raises UserError if the search had another model.
    """
    if isinstance(found, SearchResult):
        removals, where = Removals(found.summary), "blockpruner.search"
        revision = revision or found.summary["config"]["revision"]
        removals.check_model(_identity(model, revision, trust_remote_code), where, _quiet)
        return removals.order, found.channels, found.summary["dtype"], revision
    if isinstance(found, Mask):
        return sorted(found.absent, key=lambda block: block.depth), None, None, revision
    if isinstance(found, str | Path):
        path = Path(found)
        if not path.is_dir():
            order = read_official_sequence(path)
            return order, order_beside(path, order), None, revision
        if isinstance(model, PreTrainedModel):
            removals = Removals.read(path)
            removals.check_model(_identity(model, None, trust_remote_code), str(path), _quiet)
        else:
            source = ModelSource(str(model), revision, trust_remote_code)
            removals, revision = read_removals(path, source, _quiet)
        return removals.order, removals.channels, removals.summary["dtype"], revision
    return [block if isinstance(block, Block) else Block.parse(block) for block in found], None, None, revision


def _identity(model: Model, revision: str | None, trust_remote_code: bool) -> Identity:
    if isinstance(model, PreTrainedModel):
        return identity_in_memory(model, _name(model))
    return identity(ModelSource(str(model), revision, trust_remote_code))


def _quiet(text: str) -> None:
    """Say nothing, as functions do unless `verbose` is set."""


@contextmanager
def _as_it_was(model: PreTrainedModel | None) -> Iterator[None]:
    """Leave a caller's model in the mode in which it was, and torch with as many threads."""
    training, threads = model is not None and model.training, torch.get_num_threads()
    try:
        yield
    finally:
        if model is not None and training:
            model.train()
        if model is not None:
            torch.set_num_threads(threads)


@contextmanager
def _run_directory(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="blockpruner-") as folder:
        yield Path(folder) / "run"
