"""Runs methods one after the other, then evaluates their models in the same way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console
from typing_extensions import TypedDict

from blockpruner.apart import run_apart
from blockpruner.cluster.preflight import PACKAGES
from blockpruner.comparing.config import CompareConfig
from blockpruner.comparing.method import Method
from blockpruner.comparing.running import OUTCOME, read_outcome, run_method
from blockpruner.comparing.showing import draw, print_table, write_csv
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import NotFinite, UserError
from blockpruner.engine.json_files import Count, read_json
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.identity import Identity, fingerprint
from blockpruner.engine.model.loading import check_positions, meta_model
from blockpruner.engine.options import different
from blockpruner.engine.sections import Bos
from blockpruner.engine.text.bos import recorded_bos
from blockpruner.engine.text.files import recorded_name
from blockpruner.engine.work.shape import ModelShape
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.files import lock_folder, plain, write_json
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.reading import read_summary
from blockpruner.searching.resolving import Job, prepare
from blockpruner.showing.console import Reporter
from blockpruner.timing.config import LatencyConfig
from blockpruner.timing.timing import check_workload, measure_latency

DENSE = "dense"
SPEEDS = ("decode_tokens_per_s", "generate_128_s")


class _Repeated(TypedDict):
    repeats: Count


class _Speeds(TypedDict):
    decode_tokens_per_s: float | None
    generate_128_s: float | None


class _Timed(TypedDict):
    """An output of `latency`, as far as it is used."""

    setting: _Repeated
    dense: _Speeds
    pruned: _Speeds
    ratio: _Speeds


@dataclass(frozen=True)
class _Contender:
    """A method at one ratio."""

    name: str
    target: float
    outcome: dict[str, Any]
    folder: Path
    num_steps: int | None = None
    """Number of steps of the removal order; None for a checkpoint."""

    @property
    def mask(self) -> Mask | None:
        if self.num_steps is None:
            return None
        return Mask.of(Block.from_json(step["block"]) for step in self.outcome["steps"][: self.num_steps])

    @property
    def last(self) -> dict[str, Any]:
        """The entry that contains the ratio, the search time and the work."""
        return self.outcome if self.num_steps is None else self.outcome["steps"][self.num_steps - 1]


def compare_methods(config: CompareConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Compare the methods and return what `compare --json` prints.

    out: folder for the methods, the evaluations, comparison.json, comparison.csv and comparison.png. The same call
    resumes from its content.
    """
    # Each method itself checks whether it can reach the largest ratio.
    config = _resumed(config, out)
    job = prepare(config.search.replace(ratio=None, num_remove=1), reporter)
    # From here on all methods and evaluations use the same dtype and device, so `auto` cannot differ between them.
    assert job.windows.made_of is not None
    config = config.replace(dtype=job.dtype, device=job.device, bos=job.windows.made_of.bos)
    _check_reachable(config, job)
    if not config.judged:
        reporter.say("note: without `perplexity` or `tasks` the models are not evaluated")
    with lock_folder(out):
        _check_same(config, job, out)
        config = config.replace(revision=job.model.revision)  # of a hub id the commit: all methods have one model
        if config.judged:  # detects a wrong text or task before hours of pruning
            _evaluate(config.evaluation(), out / "evaluations" / "masks", (Mask(),))
        contenders = list(_run_all(config, job.shape, out, reporter))
        judged = _judge(config, contenders, out, reporter)
        # Written before the speeds are measured, which takes long and can fail.
        comparison = _write(config, job.identity, contenders, judged, None, out)
        if config.repeats:
            speeds = [_speed(config, contender, out, reporter) for contender in contenders]
            comparison = _write(config, job.identity, contenders, judged, speeds, out)
    print_table(comparison["rows"], config, reporter.console)
    if len(threads := {row["num_threads"] for row in comparison["rows"] if row["num_threads"]}) > 1:
        reporter.say(
            f"note: methods ran with {' and '.join(map(str, sorted(threads)))} threads, so their times are not "
            f"directly comparable"
        )
    reporter.say(f"wrote {out / 'comparison.json'}, comparison.csv and comparison.png")
    return comparison


def _write(
    config: CompareConfig,
    model: Identity,
    contenders: list[_Contender],
    judged: list[dict[str, Any]],
    speeds: list[dict[str, Any]] | None,
    out: Path,
) -> dict[str, Any]:
    rows = [
        {**_about(contender), **of_it, **_speed_columns(speed)}
        for contender, of_it, speed in zip(contenders, judged[1:], speeds or repeat(None, len(contenders)), strict=True)
    ]
    dense = {**dict.fromkeys(rows[0]), "method": DENSE, "ratio": 0.0, **judged[0]}
    if speeds:
        dense |= {key: speeds[0]["dense"][key] for key in SPEEDS}
    versions = {package: version(package) for package in ("blockpruner", *PACKAGES)}
    comparison = {
        "model": model.name, "fingerprint": model.fingerprint, "config": config.to_json(), "versions": versions,
        "rows": plain([dense, *rows]),
    }  # fmt: skip
    write_json(out / "comparison.json", comparison)
    write_csv(comparison["rows"], out / "comparison.csv")
    draw(comparison["rows"], config, out / "comparison.png")
    return comparison


def _check_reachable(config: CompareConfig, job: Job) -> None:
    """Raise UserError with the name of the method if a method cannot run, before anything runs."""
    model = meta_model(job.model, job.dtype)
    for name in config.methods:
        try:
            Method.named("methods", name).check(config.told(name, job.shape.num_layers), model, job.shape)
        except UserError as error:
            raise UserError(f"method {name}: {error}") from error
    if config.perplexity:
        check_positions(model.config, config.test_seq_len, "`test_seq_len`")
    if config.repeats:
        try:
            check_workload(job.model, Workload())
        except UserError as error:
            raise UserError(f"generation cannot be timed ({error}); use `repeats=0` to skip it.") from error


def _resumed(config: CompareConfig, out: Path) -> CompareConfig:
    """Return the config with the recorded `bos`, if this one leaves it open: windows stay what they were."""
    file = out / "compare.json"
    return config.replace(bos=recorded_bos(file)) if config.bos is Bos.AUTO and file.exists() else config


def _check_same(config: CompareConfig, job: Job, out: Path) -> None:
    """Raise UserError if the content of the folder was made from another model, text or options."""
    file = out / "compare.json"
    has_begun = any(out.glob(f"methods/*/{OUTCOME}")) or any(out.glob("methods/*/run"))
    theirs = read_json(file, dict[str, Any], "choose another `out`") if has_begun and file.exists() else {}
    like = theirs["weights"] if isinstance(theirs.get("weights"), str) else None
    weights = {"weights": fingerprint(job.model, like), "windows": job.windows.fingerprint}
    names = {"model": job.identity.name, "calibration": recorded_name(config.calibration)}
    mine = {**config.same_on_resume(), **names, "bos": config.bos, **weights}
    if not has_begun:
        write_json(file, mine)
        return
    theirs.setdefault("bos", Bos.FIRST_WINDOW)
    if mine.keys() - theirs.keys():
        raise UserError(f"{str(out)!r} holds a comparison of another version of blockpruner; choose another `out`.")
    for content, name in zip(weights, names, strict=True):
        if theirs[content] == mine[content]:  # the same model or text, wherever it lies
            theirs[name] = mine[name]
    if differences := different(theirs, mine):
        raise UserError(
            f"{str(out)!r} holds a comparison of another config: {differences}. Give the same options to resume it, "
            f"or choose another `out`."
        )


def _run_all(config: CompareConfig, shape: ModelShape, out: Path, reporter: Reporter) -> Iterator[_Contender]:
    for number, name in enumerate(config.methods, start=1):
        method = Method.named("methods", name)
        reporter.say(f"method {number} of {len(config.methods)}, {name}: {method.about}")
        told = config.told(name, shape.num_layers)
        folder = out / "methods" / name
        outcome = _outcome(name, told, folder, reporter) if method.is_nested else {}
        for ratio in config.ratio:
            if not method.is_nested:
                folder = out / "methods" / f"{name}-{ratio:g}"
                outcome = _outcome(name, told.replace(ratio=ratio), folder, reporter)
            yield _Contender(name, ratio, outcome, folder, None if method.rebuilds else _nearest(outcome, ratio))


def _nearest(outcome: dict[str, Any], ratio: float) -> int:
    """Return the number of steps of a removal order that comes closest to a ratio."""
    ratios = [step["ratio"] for step in outcome["steps"]]
    return min(range(len(ratios)), key=lambda index: abs(ratios[index] - ratio)) + 1


def _outcome(name: str, told: SearchConfig, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Return the outcome of an earlier session if it reached the ratio, else run the method."""
    assert told.ratio is not None
    file = folder / OUTCOME
    if file.exists():
        found: dict[str, Any] = read_outcome(file)
        if "steps" not in found or found["steps"][-1]["ratio"] >= told.ratio:
            return found
    run = folder / "run"
    if (run / "run.json").exists():
        recorded = read_summary(run)["config"]["ratio"]
        if not told.strategy.grows and recorded != told.ratio:
            (folder / OUTCOME).unlink(missing_ok=True)
            shutil.rmtree(run)  # such a search cannot be continued beyond its end
        else:  # an interrupted search cannot be resumed with a smaller ratio
            told = told.replace(ratio=max(recorded, told.ratio))
    return run_method(name, told, folder, reporter.translate)


def _judge(config: CompareConfig, contenders: list[_Contender], out: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Evaluate perplexity and tasks of the dense model and of each contender."""
    if not config.judged:
        return [{"perplexity": None, "average": None}] * (1 + len(contenders))
    whole = (contender.mask for contender in contenders if contender.mask is not None and not contender.mask.lacking)
    masks = tuple(dict.fromkeys(whole))
    found = _evaluate(config.evaluation(), out / "evaluations" / "masks", (Mask(), *masks))
    by_mask = dict(zip((Mask(), *masks), found["rows"], strict=True))
    judged = [_judged(config, by_mask[Mask()])]
    for contender in contenders:
        if contender.mask in by_mask:
            judged.append(_judged(config, by_mask[contender.mask]))
            continue
        evaluation = config.evaluation(str(contender.folder / "checkpoint"))
        if contender.num_steps is not None:  # only the run knows which channels are gone
            run = contender.folder / "run"
            evaluation = config.evaluation().replace(run=run, num_remove=(contender.num_steps,))
        try:
            found = _evaluate(evaluation, out / "evaluations" / contender.folder.name)
        except NotFinite as error:  # merged weights can give NaN or infinity; still show the other methods
            reporter.say(f"note: {contender.name} at {contender.target:g} cannot be evaluated: {error}")
            found = _without_values(by_mask[Mask()])
        judged.append(_judged(config, found))
    return judged


def _without_values(found: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation of the same texts and tasks without values."""
    texts = {text: {**values, "value": None, "stderr": None} for text, values in found["perplexity"].items()}
    nothing: dict[str, Any] = {"acc": None, "acc_norm": None, "score": None, "stderr": None, "metrics": {}}
    tasks = dict.fromkeys(found["tasks"], nothing)
    return {"perplexity": texts, "tasks": tasks, "average": None}


def _evaluate(config: EvaluationConfig, out: Path, masks: tuple[Mask, ...] = ()) -> dict[str, Any]:
    return run_apart(_evaluate_here, config, out, masks).value


def _evaluate_here(config: EvaluationConfig, out: Path, masks: tuple[Mask, ...]) -> dict[str, Any]:
    return evaluate_model(config, Reporter(Console()), out=out, masks=masks)


def _judged(config: CompareConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of an evaluation. `perplexity` is that of the first text."""
    texts = found["perplexity"]
    return {
        "perplexity": texts[config.perplexity[0]]["value"] if texts else None,
        "perplexities": texts,
        "average": found["average"],
        "tasks": found["tasks"],
    }


def _speed(config: CompareConfig, contender: _Contender, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Time generation, alternating with the dense model. A checkpoint written for this purpose is deleted again."""
    name = contender.folder.name if contender.num_steps is None else f"{contender.name}-{contender.num_steps}"
    file = out / "speeds" / f"{name}.json"
    if file.exists():
        recorded: dict[str, Any] = read_json(file, _Timed, "delete it to time the model again")
        if recorded["setting"]["repeats"] >= config.repeats:
            return recorded
    file.parent.mkdir(exist_ok=True)
    checkpoint = contender.folder / "checkpoint"
    if contender.mask is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        run_apart(_prune_here, config, contender.folder, len(contender.mask.absent), checkpoint)
    timed = LatencyConfig(
        model=str(checkpoint), repeats=config.repeats, threads=config.threads_per_replica, dtype=config.dtype,
        device=config.device, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    found = measure_latency(timed, reporter)
    if contender.mask is not None:
        shutil.rmtree(checkpoint)
    write_json(file, found)
    return found


def _prune_here(config: CompareConfig, folder: Path, num_blocks: int, checkpoint: Path) -> None:
    pruning = PruneConfig(
        model=config.model, sequence=folder / "sequence.json", num_remove=num_blocks, dtype=config.dtype,
        revision=config.revision, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    prune_model(pruning, checkpoint, Reporter(Console()))


def _speed_columns(found: dict[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys((*SPEEDS, "decode_ratio", "generate_ratio"))
    pruned = found["pruned"]
    return {
        **{key: pruned[key] for key in SPEEDS},
        "decode_ratio": found["ratio"]["decode_tokens_per_s"],
        "generate_ratio": found["ratio"]["generate_128_s"],
    }


def _about(contender: _Contender) -> dict[str, Any]:
    outcome, last = contender.outcome, contender.last
    parts = outcome["startup_s"], outcome["load_s"], last["search_s"]
    return {
        "method": contender.name,
        "target": contender.target,
        "ratio": last["ratio"],
        "mask": None if contender.mask is None else str(contender.mask),
        "pruning_s": None if None in parts else sum(parts),
        **{key: outcome[key] for key in ("num_threads", "startup_s", "load_s", "peak_memory_bytes")},
        "search_s": last["search_s"],
        "work_flops": last["work_flops"],
    }
