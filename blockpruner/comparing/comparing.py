"""Methods one after the other, then their models before one judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console

from blockpruner.apart import run_apart
from blockpruner.cluster.preflight import PACKAGES
from blockpruner.comparing.config import CompareConfig
from blockpruner.comparing.methods import Rebuilt, method
from blockpruner.comparing.rebuilding import check_rebuilt
from blockpruner.comparing.running import OUTCOME, run_method
from blockpruner.comparing.showing import draw, print_table, write_csv
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import NotFinite, UserError
from blockpruner.engine.judge.latency import Workload
from blockpruner.engine.model.loading import check_positions, fingerprint, meta_model
from blockpruner.engine.work.shape import ModelShape
from blockpruner.evaluating.evaluating import EvaluationConfig, evaluate_model
from blockpruner.files import lock_folder, plain, write_json
from blockpruner.pruning import prune_model
from blockpruner.searching.config import GROWING
from blockpruner.searching.resolving import Job, prepare
from blockpruner.searching.run import read_summary
from blockpruner.showing.console import Reporter
from blockpruner.timing.timing import check_workload, measure_latency

DENSE = "dense"
SPEEDS = ("decode_tokens_per_s", "generate_128_s")


@dataclass(frozen=True)
class _Contender:
    """A method at one of the ratios."""

    name: str
    target: float
    outcome: dict[str, Any]
    folder: Path
    num_steps: int | None = None
    """Of the removal order; None for a checkpoint."""

    @property
    def mask(self) -> Mask | None:
        if self.num_steps is None:
            return None
        return Mask.of(Block.from_json(step["block"]) for step in self.outcome["steps"][: self.num_steps])

    @property
    def last(self) -> dict[str, Any]:
        """Ratio, search time and work."""
        return self.outcome if self.num_steps is None else self.outcome["steps"][self.num_steps - 1]


def compare_methods(config: CompareConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Returns what `compare --json` prints. `out` holds a folder for each method, the evaluations, comparison.json,
    comparison.csv and comparison.png; the same call goes on from what is there."""
    job = prepare(config.search, reporter)
    # From here on all methods and judges have the same dtype and device, whatever `auto` means to each.
    config = replace(config, search=replace(config.search, dtype=job.dtype, device=job.device))
    _check_reachable(config, job)
    if not config.judged:
        reporter.say("note: nothing is judged without --perplexity or --tasks")
    with lock_folder(out):
        _check_same(config, job, out)
        if config.judged:  # a wrong text or task is found before hours of pruning
            _evaluate(config.evaluation((Mask(),)), out / "evaluations" / "masks")
        contenders = list(_run_all(config, job.shape, out, reporter))
        judged = _judge(config, contenders, out, reporter)
        comparison = _write(config, contenders, judged, None, out)  # speeds take long, and may fail
        if config.repeats:
            speeds = [_speed(config, contender, out, reporter) for contender in contenders]
            comparison = _write(config, contenders, judged, speeds, out)
    print_table(comparison["rows"], config, reporter.console)
    if len(threads := {row["num_threads"] for row in comparison["rows"] if row["num_threads"]}) > 1:
        reporter.say(
            f"note: methods ran with {' and '.join(map(str, sorted(threads)))} threads; their times differ by that"
        )
    reporter.say(f"wrote {out / 'comparison.json'}, comparison.csv and comparison.png")
    return comparison


def _write(
    config: CompareConfig,
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
        "model": config.search.model, "config": config.told(), "versions": versions, "rows": plain([dense, *rows]),
    }  # fmt: skip
    write_json(out / "comparison.json", comparison)
    write_csv(comparison["rows"], out / "comparison.csv")
    draw(comparison["rows"], config, out / "comparison.png")
    return comparison


def _check_reachable(config: CompareConfig, job: Job) -> None:
    """Raise UserError, by the method's name, before anything runs."""
    model = meta_model(job.model, job.dtype)
    for name in config.methods:
        try:
            if isinstance(method(name).how, Rebuilt):
                check_rebuilt(name, model, job.shape, max(config.ratio))
            else:
                config.search_by(name, job.shape).space(job.shape)
        except UserError as error:
            raise UserError(f"method {name}: {error}") from error
    if config.perplexity:
        check_positions(model.config, config.test_seq_len, "--test-seq-len")
    if config.repeats:
        try:
            check_workload(job.model, Workload())
        except UserError as error:
            raise UserError(f"generation cannot be timed ({error}); --repeats 0 leaves it out.") from error


def _check_same(config: CompareConfig, job: Job, out: Path) -> None:
    """What the folder holds was made from the same model, text and options."""
    file = out / "compare.json"
    mine = {**config.to_json(), "weights": fingerprint(job.model), "windows": job.windows.fingerprint}
    has_begun = any(out.glob(f"methods/*/{OUTCOME}")) or any(out.glob("methods/*/run"))
    if not has_begun:
        write_json(file, mine)
        return
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if mine.keys() - theirs.keys():
        raise UserError(f"{str(out)!r} holds a comparison of another version of blockpruner; choose another --out.")
    if wrong := [
        f"{key} was {theirs.get(key)!r}, now {value!r}" for key, value in mine.items() if theirs.get(key) != value
    ]:
        raise UserError(
            f"{str(out)!r} holds a comparison of another config: {'; '.join(wrong)}. Give the same options to go on "
            f"with it, or choose another --out."
        )


def _run_all(config: CompareConfig, shape: ModelShape, out: Path, reporter: Reporter) -> Iterator[_Contender]:
    for number, name in enumerate(config.methods, start=1):
        reporter.say(f"method {number} of {len(config.methods)}, {name}: {method(name).about}")
        if isinstance(method(name).how, Rebuilt):
            for ratio in config.ratio:
                folder = out / "methods" / f"{name}-{ratio:g}"
                yield _Contender(name, ratio, _outcome(name, config, shape, folder, ratio), folder)
            continue
        folder = out / "methods" / name
        outcome = _outcome(name, config, shape, folder, max(config.ratio))
        ratios = [step["ratio"] for step in outcome["steps"]]
        for ratio in config.ratio:
            steps = min(range(len(ratios)), key=lambda index: abs(ratios[index] - ratio)) + 1
            yield _Contender(name, ratio, outcome, folder, steps)


def _outcome(name: str, config: CompareConfig, shape: ModelShape, folder: Path, ratio: float) -> dict[str, Any]:
    """What the method came to in an earlier session, if that went far enough."""
    file = folder / OUTCOME
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "steps" not in found or found["steps"][-1]["ratio"] >= ratio:
            return found
    search = config.search_by(name, shape)
    run = folder / "run"
    if (run / "run.json").exists():
        recorded = read_summary(run)["config"]["ratio"]
        if search.strategy not in GROWING and recorded != search.ratio:
            (folder / OUTCOME).unlink(missing_ok=True)
            shutil.rmtree(run)  # such a search cannot go further from where it ended
        else:  # nor go back, after an interruption
            search = replace(search, ratio=max(recorded, search.ratio or 0.0))
    return run_method(name, search, folder, ratio=ratio)


def _judge(config: CompareConfig, contenders: list[_Contender], out: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """Perplexity and tasks of the dense model and of each contender."""
    if not config.judged:
        return [{"perplexity": None, "average": None}] * (1 + len(contenders))
    masks = tuple(dict.fromkeys(contender.mask for contender in contenders if contender.mask is not None))
    found = _evaluate(config.evaluation((Mask(), *masks)), out / "evaluations" / "masks")
    by_mask = dict(zip((Mask(), *masks), found["rows"], strict=True))
    judged = [_judged(config, by_mask[Mask()])]
    for contender in contenders:
        if contender.mask is not None:
            judged.append(_judged(config, by_mask[contender.mask]))
            continue
        evaluation = config.evaluation((), str(contender.folder / "checkpoint"))
        try:
            found = _evaluate(evaluation, out / "evaluations" / contender.folder.name)
        except NotFinite as error:  # merged weights may give no finite likelihoods; the others shall be shown
            reporter.say(f"note: {contender.name} at {contender.target:g} cannot be judged: {error}")
            found = _without_values(by_mask[Mask()])
        judged.append(_judged(config, found))
    return judged


def _without_values(found: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of the same texts and tasks that came to nothing."""
    texts = {text: {**values, "value": None, "stderr": None} for text, values in found["perplexity"].items()}
    nothing: dict[str, Any] = {"acc": None, "acc_norm": None, "score": None, "stderr": None, "metrics": {}}
    tasks = dict.fromkeys(found["tasks"], nothing)
    return {"perplexity": texts, "tasks": tasks, "average": None}


def _evaluate(config: EvaluationConfig, out: Path) -> dict[str, Any]:
    return run_apart(_evaluate_here, config, out).value


def _evaluate_here(config: EvaluationConfig, out: Path) -> dict[str, Any]:
    return evaluate_model(config, Reporter(Console()), out=out)


def _judged(config: CompareConfig, found: dict[str, Any]) -> dict[str, Any]:
    """The columns of an evaluation. `perplexity` is that on the first text."""
    texts = found["perplexity"]
    return {
        "perplexity": texts[config.perplexity[0]]["value"] if texts else None,
        "perplexities": texts,
        "average": found["average"],
        "tasks": found["tasks"],
    }


def _speed(config: CompareConfig, contender: _Contender, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Generation beside the dense model, in turn. A checkpoint is made for it, and goes again."""
    name = contender.folder.name if contender.num_steps is None else f"{contender.name}-{contender.num_steps}"
    file = out / "speeds" / f"{name}.json"
    if file.exists():
        recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if recorded["setting"]["repeats"] >= config.repeats:
            return recorded
    file.parent.mkdir(exist_ok=True)
    checkpoint = contender.folder / "checkpoint"
    if contender.mask is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        run_apart(_prune_here, config, contender.folder, len(contender.mask.absent), checkpoint)
    search = config.search
    found = measure_latency(
        str(checkpoint), reporter, workload=Workload(), repeats=config.repeats, threads=search.threads_per_replica,
        dtype=search.dtype, device=search.device, trust_remote_code=search.trust_remote_code,
    )  # fmt: skip
    if contender.mask is not None:
        shutil.rmtree(checkpoint)
    write_json(file, found)
    return found


def _prune_here(config: CompareConfig, folder: Path, num_blocks: int, checkpoint: Path) -> None:
    search = config.search
    prune_model(
        search.model, checkpoint, Reporter(Console()), sequence=folder / "sequence.json", num_remove=num_blocks,
        dtype=search.dtype, revision=search.revision, trust_remote_code=search.trust_remote_code,
    )  # fmt: skip


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
