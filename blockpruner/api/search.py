"""Search a model in memory in this process, or one by its name on replicas."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.api.models import Model, as_it_was, check_no_other_parts, name_of
from blockpruner.api.printing import printing
from blockpruner.api.texts import Text, texts_of
from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.sections import Calibration
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_order
from blockpruner.searching.records import StepRecord
from blockpruner.searching.resolving import Given
from blockpruner.searching.result import SearchResult


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
        flat["calibration"] = texts_of(text)
    else:
        windows = text
        made_of = windows.made_of or Calibration(calibration=("windows in memory",), seq_len=windows.seq_len)
        flat |= dict(made_of)
        flat |= {name: options[name] for name in ("seed",) if name in options}
    live = model if isinstance(model, PreTrainedModel) else None
    if live is not None:
        _check_live(live, windows, options)
        flat |= {"model": name_of(live), "no_ray": True, "replicas": None}
    else:
        flat["model"] = str(model)
    config = SearchConfig.of(**flat)
    told = on_step or (lambda step: None)
    with printing(verbose) as reporter, as_it_was(live), _run_directory(out) as run:
        given = Given(None if live is None else Decoder(live), windows)
        summary = run_search(config, run, reporter, given=given, on_step=told)
        channels = read_order(run, summary)
    return SearchResult(summary, None if out is None else run, channels)


def _check_live(model: PreTrainedModel, windows: Windows | None, options: dict[str, Any]) -> None:
    """Raise UserError for what a model in memory cannot do."""
    check_no_other_parts(model)
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


@contextmanager
def _run_directory(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="blockpruner-") as folder:
        yield Path(folder) / "run"
