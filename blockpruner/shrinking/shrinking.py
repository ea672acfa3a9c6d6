"""Search, prune, compensate, evaluate, measure, report, export: one after the other, each where it was left."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockpruner.compensating.compensating import compensate_checkpoint
from blockpruner.compensating.config import CompensateConfig
from blockpruner.engine.blocks import Units
from blockpruner.engine.checkpoint.formats.gguf import Gguf
from blockpruner.engine.checkpoint.grouped import read_provenance
from blockpruner.engine.compensation.stages import check_fittable
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.identity import Identity, identity
from blockpruner.engine.model.loading import (
    load_config,
    load_tokenizer,
    materialize,
    meta_model,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.options import Options, different
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.text.rows import check_texts
from blockpruner.evaluating.perplexities import perplexities, text_windows
from blockpruner.exporting.config import ExportConfig
from blockpruner.exporting.exporting import export_model
from blockpruner.files import lock_folder, write_json
from blockpruner.planning.config import PlanConfig
from blockpruner.planning.planning import plan_search
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.reporting.config import ReportConfig
from blockpruner.reporting.writing import write_report
from blockpruner.searching.config import FREE_ON_RESUME, SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.commands import command_line
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table
from blockpruner.shrinking.config import ShrinkConfig
from blockpruner.shrinking.texts import Split, read_windows
from blockpruner.timing.config import LatencyConfig
from blockpruner.timing.timing import measure_latency

BEGUN = "shrink.json"
"""What the folder was begun with. The same options go on with it."""
OLD = {"units": Units.BLOCKS}
"""Options of folders that were begun before the options existed."""
FINGERPRINT = "fingerprint"
"""What is recorded of the model beside the options (`Identity`). Earlier versions did not."""
FREE = FREE_ON_RESUME | {"export", "gguf_type", "dry_run"}
"""Options that may change when the same folder is gone on with."""
KEPT_BACK = "kept-back windows"
"""Name of the judged windows beside texts."""
FIT: dict[str, Any] = {"method": "both", "ridge": 0.1}
"""What did best in the measurements (docs/results/compensation.md)."""
PROMPT_LEN, NUM_TOKENS, REPEATS = 128, 32, 5
"""Of the measured generations; shorter ones for shorter windows, which the model is known to take."""


@dataclass(frozen=True)
class Part:
    name: str
    output: Path
    """Is there when the part is done."""
    run: Callable[[], Any]
    command: str | None
    """The command that does this part alone, if there is one."""
    about: str = ""
    """What is done, if there is none."""


def shrink_model(config: ShrinkConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write a smaller model to `out / "model"`, and what was measured beside it. The same call goes on where an earlier
    one was stopped. Returns what `shrink --json` prints."""
    start = time.monotonic()
    place = resolve_device(config.device)
    known = identity(config.source)
    source = known.at(config.source)
    pinned = config.replace(revision=source.revision)  # of a hub id the commit, so that all parts have one model
    dtype, _ = resolve_dtype(config.dtype, source, place)
    check_texts((*config.calibration, *config.perplexity))  # before weights are fetched
    source = materialize(source, dtype, reporter.say)
    # Refuse before anything is searched.
    dense = meta_model(source, dtype)
    if not config.no_compensate:
        check_fittable(Decoder(dense))
    for name in config.export:
        _export_config(config, name, out).format.check_dense(dense.config, source)
    split = read_windows(config, source)
    way = Way(pinned, out, split, source, dtype, place, reporter)
    reporter.say(
        f"{len(split.all.tokens)} windows of {config.seq_len} tokens: the search scores {split.num_searched}, the "
        f"compensation fits on {split.num_fitted}, {len(split.judged)} are kept back"
    )
    if config.dry_run:
        return way.told()
    lock = lock_folder(out)
    try:
        _begin(config, out, split, known)
        times = {part.name: way.do(part) for part in way.parts()}
        result = way.result()
    finally:
        if [one.name for one in out.iterdir() if one.name != ".lock"] == [BEGUN]:  # the search refused to begin
            (out / BEGUN).unlink()
        lock.release()
    seconds = time.monotonic() - start
    reporter.say(f"the smaller model is in {way.model}; {seconds:.0f} s")
    return {**result, "part_s": times, "seconds": seconds}


def _begin(config: ShrinkConfig, out: Path, split: Split, model: Identity) -> None:
    """Record the options and the model, or compare them with those of an earlier call. Raises UserError if they
    differ."""
    mine = {name: value for name, value in config.to_json().items() if name not in FREE}
    mine |= {"windows": split.all.fingerprint, "blocks": config.removed, FINGERPRINT: model.fingerprint}
    path = out / BEGUN
    if path.exists():
        begun = read_json(path, dict[str, Any], "choose another `out`")
        began = Identity(config.model, begun.get(FINGERPRINT))
        if began.fingerprint not in (None, model.fingerprint):
            raise UserError(
                f"{str(out)!r} was begun with another model: with {began}, now it is {model}. Give "
                f"{began.how_to_give}, or another `out`."
            )
        if began.fingerprint is not None:
            begun["revision"] = mine["revision"]  # the same commit, whatever its name
        if differences := different({**OLD, **begun, FINGERPRINT: model.fingerprint}, mine):
            raise UserError(
                f"{str(out)!r} was begun with other options: {differences}. Use the same, or another `out`."
            )
    elif others := sorted(one.name for one in out.iterdir() if one.name != ".lock"):
        raise UserError(f"expected a new or an empty folder for `out`, got {str(out)!r} with {others[0]!r} in it.")
    else:
        write_json(path, mine)


class Way:
    """The parts of one call, with the folders and files that they write."""

    def __init__(
        self, config: ShrinkConfig, out: Path, split: Split, source: ModelSource, dtype: str, place: torch.device,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self.config, self.out, self.split, self.reporter = config, out, split, reporter
        self.source, self.dtype, self.place = source, dtype, place
        self.run, self.pruned, self.model = out / "run", out / "pruned", out / "model"
        self.evaluation, self.latency = out / "perplexity.json", out / "latency.json"
        self.page = out / "report" / "report.html"

    def parts(self) -> list[Part]:
        config, prune, compensate = self.config, self.prune_config(None), self.compensate_config(self.pruned)
        search = SearchConfig.of(**self._search())
        report = ReportConfig(runs=(self.run,), out=self.page.parent, latency=(self.latency,))
        latency = LatencyConfig.of(
            model=str(self.model), trust_remote_code=config.trust_remote_code, dtype=self.dtype, device=config.device,
            repeats=REPEATS, prompt_len=min(PROMPT_LEN, config.seq_len // 2),
            num_tokens=min(NUM_TOKENS, config.seq_len // 2),
        )  # fmt: skip
        is_bound, is_left_out = config.max_perplexity_increase is not None, config.no_compensate
        lines = {
            "search": _line("search", search, config.model, self.run),
            "prune": None if is_bound else _line("prune", prune, config.model, self.pruned),
            "compensate": None if is_bound or is_left_out
            else _line("compensate", compensate, str(self.pruned), self.model),
            "latency": f"{_line('latency', latency, str(self.model))} --json > {shlex.quote(str(self.latency))}",
            "report": command_line("report", str(self.run), out=self.page.parent, latency=self.latency),
        }  # fmt: skip
        bisection = "bisection over the removal order, with a compensation of each model" if is_bound else ""
        judgement = "perplexity of the dense, the pruned and the smaller model"
        return [
            Part("search", self.run / "run.json", lambda: run_search(search, self.run, self.reporter), lines["search"]),
            Part("prune", self.pruned, self._prune, lines["prune"], bisection),
            Part("compensate", self.model, lambda: self.compensate(self.pruned, self.model), lines["compensate"],
                 "left out: the pruned model is the result" if is_left_out else bisection and "done by the bisection"),
            Part("evaluate", self.evaluation, lambda: write_json(self.evaluation, self._perplexity()), None, judgement),
            Part("latency", self.latency, lambda: write_json(self.latency, measure_latency(latency, self.reporter)),
                 lines["latency"]),
            Part("report", self.page, lambda: write_report(report, self.reporter), lines["report"]),
            *(Part(f"export {name}", self.out / name, partial(self._export, name),
                   command_line("export", str(self.model), **_format(config, name), out=self.out / name))
              for name in config.export),
        ]  # fmt: skip

    def do(self, part: Part) -> float:
        """Do a part unless it is done, and return its seconds."""
        if part.output.exists() and part.name != "search":  # a search itself knows whether it is at its end
            self.reporter.say(f"{part.name}: {part.output} is there already")
            return 0.0
        self.reporter.say(f"\n{part.name}: {part.command or part.about}")
        start = time.monotonic()
        part.run()
        return time.monotonic() - start

    def told(self) -> dict[str, Any]:
        """Say what would be done, and how long the search and the fit are expected to take."""
        parts = self.parts()
        plan = plan_search(PlanConfig.of(**self._search()), self.reporter)
        strategies = plan["strategies"]
        fit_s = plan["compensation"]["forecast_s"] * self.split.num_fitted / self.split.num_searched
        expected = {"search": strategies.get("lazy", strategies["greedy"])["forecast_s"], "compensate": fit_s}
        notes = {} if "lazy" in strategies else {"search": " for greedy (how much lazy saves is not known here)"}
        for part in parts:
            told = f", about {expected[part.name]:.0f} s{notes.get(part.name, '')}" if part.name in expected else ""
            self.reporter.say(f"{part.name}{told}: {part.command or part.about}")
        return {"parts": [{"name": part.name, "command": part.command} for part in parts], "expected_s": expected}

    def result(self) -> dict[str, Any]:
        provenance = read_provenance(str(self.model))
        perplexity = read_json(self.evaluation, dict[str, dict[str, float | None]], "delete it")
        latency = read_json(self.latency, dict[str, Any], "delete it")
        grid = numbers_table("", "dense", "pruned", "smaller", "change")
        sizes = provenance["num_parameters_dense"], provenance["num_parameters"]
        speeds = {"prefill, tokens/s": "prefill_tokens_per_s", "decoding, tokens/s": "decode_tokens_per_s"}
        rows: dict[str, tuple[float | None, float | None, float | None]] = {
            "parameters": (*sizes, sizes[1]),
            **{f"perplexity, {text}": (of["dense"], of["pruned"], of["model"]) for text, of in perplexity.items()},
            **{name: (latency["dense"][key], *[latency["pruned"][key]] * 2) for name, key in speeds.items()},
        }
        for name, values in rows.items():
            dense, _, smaller = values
            # None is a perplexity that is not finite, which JSON does not have.
            change = "–" if not dense or smaller is None else f"{smaller / dense - 1:+.1%}"
            grid.add_row(name, *map(_shown, values), change)
        self.reporter.console.print(grid)
        return {
            "out": str(self.model),
            "ratio": provenance["ratio"],
            "removed": provenance["removed"],
            "num_parameters": provenance["num_parameters"],
            "perplexity": perplexity,
            "speedup": latency["ratio"],
            "report": str(self.page),
        }

    def prune_config(self, num_remove: int | None) -> PruneConfig:
        config = self.config
        return PruneConfig(
            model=config.model, revision=config.revision, trust_remote_code=config.trust_remote_code, run=self.run,
            num_remove=num_remove, text_only=True,
        )  # fmt: skip

    def compensate_config(self, folder: Path) -> CompensateConfig:
        more = {"folder": folder, "num_windows": self.split.num_fitted, **FIT}
        return CompensateConfig.of(**{**self._common(), **more})

    def compensate(self, pruned: Path, out: Path) -> None:
        if self.config.no_compensate:
            shutil.copytree(pruned, aside := out.with_name(f".{out.name}"), dirs_exist_ok=True)
            aside.rename(out)
        else:
            compensate_checkpoint(self.compensate_config(pruned), out, self.reporter)

    def judged(self, which: str, model: ModelSource) -> float:
        """Return a model's perplexity on the windows that are kept back."""
        sets = {KEPT_BACK: self.split.judged}
        return perplexities(which, model, self.dtype, self.place, sets, self.reporter)[KEPT_BACK]

    def written(self, folder: Path) -> ModelSource:
        return ModelSource(str(folder), trust_remote_code=self.config.trust_remote_code)

    def _prune(self) -> None:
        if self.config.max_perplexity_increase is None:
            prune_model(self.prune_config(None), self.pruned, self.reporter)
        else:
            from blockpruner.shrinking.bound import prune_within_bound

            prune_within_bound(self, self.config.max_perplexity_increase)

    def _export(self, name: str) -> None:
        export_model(_export_config(self.config, name, self.model), self.out / name, self.reporter)

    def _perplexity(self) -> Mapping[str, Mapping[str, float]]:
        config = self.config
        sets: dict[str, Tensor] = {KEPT_BACK: self.split.judged}
        sets |= text_windows(
            config.perplexity, load_tokenizer(self.source), load_config(self.source), seq_len=config.seq_len,
            text_column=config.text_column, chat_template=config.chat_template, bos=config.bos, num_windows=None,
        )  # fmt: skip
        models = {
            "dense": self.source,
            "pruned": self.written(self.pruned),
            "model": self.written(self.model),
        }
        found: dict[str, dict[str, float]] = {text: {} for text in sets}
        for which, model in models.items():
            for text, value in perplexities(which, model, self.dtype, self.place, sets, self.reporter).items():
                found[text][which] = value
        return found

    def _search(self) -> dict[str, Any]:
        """Options of the search, which a plan takes, too."""
        config = self.config
        return {
            **self._common(), "model": config.model, "revision": config.revision,
            "num_windows": self.split.num_searched, "strategy": "lazy", "blocks": config.removed, "units": config.units,
            **config.budget,
        }  # fmt: skip

    def _common(self) -> dict[str, Any]:
        """Options that the search and the compensation share with this command."""
        names = {*SearchConfig.model_fields} & {*CompensateConfig.model_fields} & {*ShrinkConfig.model_fields}
        return {**{name: getattr(self.config, name) for name in names}, "dtype": self.dtype}


def _shown(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _export_config(config: ShrinkConfig, name: str, folder: Path) -> ExportConfig:
    return ExportConfig.of(folder=folder, trust_remote_code=config.trust_remote_code, **_format(config, name))


def _format(config: ShrinkConfig, name: str) -> dict[str, Any]:
    return {"format": name, **({"gguf_type": config.gguf_type} if name == Gguf.name else {})}


def _line(name: str, config: Options, subject: str, out: Path | None = None) -> str:
    options = {
        key: list(value) if key in ("calibration", "perplexity") else value for key, value in config.given().items()
    }
    for key in ("model", "folder"):
        options.pop(key, None)
    return command_line(name, subject, **options, out=out)
