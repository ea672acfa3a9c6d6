"""The search: the strategy asks, the scorer answers, the ledger is written, the strategy is told."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.config import SearchConfig
from cluster.placement import NodeResources, Placement, default_threads, local_cpus, place
from cluster.progress import Reporter
from cluster.run import RunDirectory, StepSums, score_record
from cluster.session import interruptible, ray_session
from engine.blocks import Block, Kind, Mask
from engine.calibration import Windows, calibration_windows
from engine.decoder import Decoder
from engine.errors import UserError
from engine.loading import DTYPES, load_config, load_tokenizer, materialize, resolve_device, resolve_dtype
from engine.scoring import LocalScorer, MaskScorer, Score, Scorer
from engine.search.greedy import Greedy
from engine.shape import ModelShape
from engine.units import KernelShape, kernel_shape, split_work


def run_search(config: SearchConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Search, or go on with the search that `out` holds. Returns run.json's content.

    Raises UserError for what the user can mend, SearchFailed when no candidate has a finite perplexity, and
    KeyboardInterrupt after SIGINT or SIGTERM; the run then can be resumed.
    """
    with interruptible(), RunDirectory(out) as run:
        if run.header is not None:
            _check_same_config(config, run)
        job = _prepare(config, reporter)
        search = _Search(config, job, run, reporter)
        search.replay()
        if not search.is_finished:
            with _open_scorer(config, job, run, reporter) as scorer:
                search.go_on(scorer)
        return search.summary("finished")


@dataclass(frozen=True)
class _Job:
    """A config with every automatic choice made."""

    path: str
    """What replicas load."""
    device: str
    dtype: str
    windows: Windows
    shape: ModelShape


def _prepare(config: SearchConfig, reporter: Reporter) -> _Job:
    device = _choose_device(config)
    dtype, reason = resolve_dtype(config.dtype, config.model, torch.device(device))
    reporter.say(f"model {config.model} in {dtype} ({reason}) on {device}")
    path = materialize(config.model, dtype)
    shape = _shape_of(path, dtype)
    config.budget.check(config.blocks, shape)
    windows = calibration_windows(
        config.calibration,
        load_tokenizer(path),
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        text_column=config.text_column,
        num_windows=config.num_windows,
    )
    for note in windows.notes:
        reporter.say(f"note: {note}")
    reporter.say(
        f"{2 * shape.num_layers} blocks, {shape.num_parameters:,} parameters; calibration on {config.calibration}: "
        f"{windows.num_windows} windows of {windows.seq_len} tokens from {windows.num_rows} rows"
    )
    return _Job(path, device, dtype, windows, shape)


def _choose_device(config: SearchConfig) -> str:
    if config.address is not None and config.device == "auto":
        return "cuda" if config.gpus_per_replica and _cluster_has_gpus(config.address) else "cpu"
    if config.address is not None:
        return config.device
    return str(resolve_device(config.device))


def _cluster_has_gpus(address: str) -> bool:
    with ray_session(address, local_cpus()):
        return any(node.num_gpus for node in _cluster_nodes())


def _shape_of(path: str, dtype: str) -> ModelShape:
    """From the config alone: no weight is read."""
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(load_config(path), dtype=DTYPES[dtype])).shape


@contextmanager
def _open_scorer(config: SearchConfig, job: _Job, run: RunDirectory, reporter: Reporter) -> Iterator[Scorer]:
    """Replicas that are loaded, with the run's kernel shape: the recorded one, or a new one that is recorded now."""
    recorded = KernelShape(**run.header["kernel"]) if run.header else None
    threads = recorded.threads if recorded else default_threads(config)
    kernel = recorded or kernel_shape(
        job.shape,
        seq_len=job.windows.seq_len,
        num_windows=job.windows.num_windows,
        bytes_per_value=DTYPES[job.dtype].itemsize,
        threads=threads,
    )
    with ExitStack() as stack:
        if config.address is not None:
            stack.enter_context(ray_session(config.address, local_cpus()))
            placement = place(config, job.device, _cluster_nodes(), threads)
        else:
            placement = place(config, job.device, [_this_machine(job.device)], threads)
        reporter.say(f"{placement.num_replicas} replicas ({placement.reason})")
        if config.address is None and placement.num_replicas == 1:
            replica = MaskScorer(
                job.path, dtype=job.dtype, device=job.device, windows=job.windows.tokens, threads=threads
            )
            kernel = recorded or _probed(kernel, replica.is_batch_invariant(kernel), reporter)
            scorer: Scorer = LocalScorer(replica, kernel)
        else:
            if config.address is None:
                stack.enter_context(ray_session(None, max(local_cpus(), placement.num_replicas * threads)))
            scorer = stack.enter_context(_ray_scorer(job, placement, reporter))
            kernel = recorded or _probed(kernel, scorer.is_batch_invariant(kernel), reporter)
            scorer.use(kernel)
        if recorded is None:
            run.append("run", _header(config, job, kernel))
        yield scorer


def _ray_scorer(job: _Job, placement: Placement, reporter: Reporter) -> Any:
    from cluster.dispatch import RayScorer, ReplicaSpec  # after ray_session has set the environment

    spec = ReplicaSpec(job.path, job.dtype, job.device, job.windows.tokens, placement.threads, placement.num_gpus)
    return RayScorer(spec, placement.num_replicas, reporter.say)


def _probed(kernel: KernelShape, is_batch_invariant: bool, reporter: Reporter) -> KernelShape:
    from dataclasses import replace

    if not is_batch_invariant:
        reporter.say(
            "note: scores depend on the size of a batch here; chunks of masks stay as they are on all replicas"
        )
    return replace(kernel, batch_invariant=is_batch_invariant)


def _this_machine(device: str) -> NodeResources:
    return NodeResources(local_cpus(), torch.cuda.device_count() if device == "cuda" else 0)


def _cluster_nodes() -> list[NodeResources]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeResources(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive]


def _header(config: SearchConfig, job: _Job, kernel: KernelShape) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "dtype": job.dtype,
        "device": job.device,
        "kernel": kernel.to_json(),
        "calibration": _calibration(job.windows),
        "versions": {
            **{package: version(package) for package in ("blockpruner", "torch", "transformers", "ray")},
            "python": platform.python_version(),
        },
    }


def _calibration(windows: Windows) -> dict[str, Any]:
    return {
        "num_windows": windows.num_windows,
        "num_tokens": windows.tokens.numel(),
        "fingerprint": windows.fingerprint,
    }


def _check_same_config(config: SearchConfig, run: RunDirectory) -> None:
    assert run.header is not None
    differences = config.differences(run.header["config"])
    if differences:
        raise UserError(
            f"{str(run.path)!r} holds a run of another config: {'; '.join(differences)}. "
            f"Give the same options to resume it, or choose another --out."
        )


class _Search:
    """One search over one run directory."""

    def __init__(self, config: SearchConfig, job: _Job, run: RunDirectory, reporter: Reporter) -> None:
        self._config = config
        self._job = job
        self._run = run
        self._reporter = reporter
        self._strategy = Greedy(config.blocks, config.budget, job.shape)

    @property
    def is_finished(self) -> bool:
        return self._run.header is not None and not self._strategy.ask()

    def replay(self) -> None:
        """Put the strategy where the ledger ends."""
        header, steps = self._run.header, self._run.steps
        if header is None:
            return
        if header["calibration"] != _calibration(self._job.windows):
            raise UserError(
                f"the calibration text or the tokenizer has changed since {str(self._run.path)!r} was begun "
                f"({header['calibration']['num_tokens']} tokens then, {self._job.windows.tokens.numel()} now, or other "
                f"ones); restore it or choose another --out."
            )
        for step in steps:
            if not self._strategy.ask():
                raise UserError(
                    f"{str(self._run.path)!r} has removed {len(steps)} blocks already; the target may grow but not "
                    f"shrink. `blockpruner prune --num-remove K` takes the first K of them."
                )
            kind, layer = step["block"]
            self._strategy.accept(Block(Kind(kind), layer))
        self._reporter.say(f"resuming {self._run.path} after step {len(steps)}")

    def go_on(self, scorer: Scorer) -> None:
        try:
            with self._reporter.bar("search", self._expected_flops()):
                self._score_dense(scorer)
                while candidates := self._strategy.ask():
                    self._step(scorer, candidates)
        except BaseException:
            if self._run.header is not None:
                self.summary("stopped")
            raise

    def summary(self, status: str) -> dict[str, Any]:
        """Write and return run.json's content."""
        header = self._run.header
        assert header is not None
        steps = self._run.steps
        dense = next((line for line in self._run.lines if line["type"] == "score" and line["step"] == 0), None)
        content = {
            "status": status,
            "model": self._config.model,
            "config": {**header["config"], **{key: self._config.to_json()[key] for key in ("num_remove", "ratio")}},
            "versions": header["versions"],
            "dtype": header["dtype"],
            "device": header["device"],
            "kernel": header["kernel"],
            "calibration": header["calibration"],
            "placement": "resident",
            "num_replicas": steps[-1]["num_replicas"] if steps else None,
            "num_parameters": self._job.shape.num_parameters,
            "num_layers": self._job.shape.num_layers,
            "dense": dense and {"nll": dense["nll"], "perplexity": dense["perplexity"]},
            "steps": steps,
            "totals": {key: sum(step[key] for step in steps) for key in ("work_flops", "naive_work_flops", "wall_s")},
        }
        self._run.write_summary(content)
        return content

    def _score_dense(self, scorer: Scorer) -> None:
        """Score the model as it is. A resumed run does it again and must get the same bits: else the model, the
        libraries or the processor are not those of the first part."""
        recorded = self._run.unit_results(0)
        score = self._score(scorer, 0, [Mask()], known=StepSums())[0]
        earlier = recorded.sums.get(Mask(), {})
        if any(score.window_sums[window] != value for window, value in earlier.items()):
            raise UserError(
                f"the dense model scores {score.nll!r} here, not what {str(self._run.path)!r} recorded: the model, the "
                f"library versions or the processor differ. Resume it where it began, or choose another --out."
            )
        self._record_scores(0, {None: score})
        self._reporter.say(f"dense: perplexity {score.perplexity:.4f}")
        self.summary("running")

    def _step(self, scorer: Scorer, candidates: Sequence[Any]) -> None:
        start = time.perf_counter()
        number = len(self._strategy.removed) + 1
        shape, windows = self._job.shape, self._job.windows
        masks = [candidate.mask for candidate in candidates]
        scores = self._score(scorer, number, masks, known=self._run.unit_results(number))
        self._record_scores(number, {item.block: score for item, score in zip(candidates, scores, strict=True)})
        best = self._strategy.tell(candidates, [score.nll for score in scores])
        flops = sum(unit.flops for unit in self._units(scorer, masks))
        naive = windows.num_windows * sum(shape.forward_flops(mask, windows.seq_len) for mask in masks)
        step = {
            "step": number,
            "block": [str(candidates[best].block.kind), candidates[best].block.layer],
            "nll": scores[best].nll,
            "perplexity": scores[best].perplexity,
            "ratio": shape.ratio(self._strategy.mask),
            "num_candidates": len(candidates),
            "num_scored": len(scores),
            "work_flops": flops,
            "naive_work_flops": naive,
            "wall_s": time.perf_counter() - start,
            "num_replicas": scorer.num_replicas,
        }
        self._run.append("step", step)
        self._reporter.expect(self._expected_flops(), f"step {number + 1}")
        self._reporter.say(
            f"step {number}: {candidates[best].block} removed, perplexity {step['perplexity']:.4f}, ratio "
            f"{step['ratio']:.4f}, {len(scores)} candidates in {step['wall_s']:.1f} s, ETA {self._reporter.eta}"
        )
        self.summary("running")

    def _record_scores(self, step: int, scores: Mapping[Block | None, Score]) -> None:
        """Write `score` lines, but for those that an interrupted session wrote before."""
        sums = self._run.unit_results(step)
        written = {line["mask"] for line in self._run.lines if line["type"] == "score" and line["step"] == step}
        for block, score in scores.items():
            if str(score.mask) not in written:
                self._run.append("score", score_record(step, block, score, sums))

    def _units(self, scorer: Scorer, masks: Sequence[Mask]) -> list[Any]:
        assert self._run.header is not None
        return split_work(
            masks,
            self._job.shape,
            KernelShape(**self._run.header["kernel"]),
            num_windows=self._job.windows.num_windows,
            seq_len=self._job.windows.seq_len,
            num_replicas=scorer.num_replicas,
        )

    def _score(self, scorer: Scorer, step: int, masks: Sequence[Mask], known: StepSums) -> list[Score]:
        """Score masks, in their order. Units that the ledger knows are not done again."""
        units = self._units(scorer, masks)
        for result in scorer.run([unit for unit in units if not known.has(unit.masks, unit.first, unit.stop)]):
            unit = result.unit
            known.add(unit.masks, unit.first, unit.stop, result.sums, result.seconds, result.replica)
            self._run.append_unit(step, result)
            self._reporter.advance(unit.flops)
        windows = self._job.windows
        return [
            Score(mask, tuple(known.sums[mask][window] for window in range(windows.num_windows)), windows.seq_len - 1)
            for mask in masks
        ]

    def _expected_flops(self) -> float:
        """Work of this session as far as it can be foreseen: what is done and the steps to come, each in proportion to
        candidates x blocks left."""
        return self._reporter.done + sum(self._forecast(number) for number in range(self._num_steps_left()))

    def _forecast(self, steps_ahead: int) -> float:
        shape, windows = self._job.shape, self._job.windows
        num_blocks = 2 * shape.num_layers
        left = num_blocks - len(self._strategy.mask.absent) - steps_ahead
        candidates = len(self._config.blocks.candidates(shape.num_layers)) - len(self._strategy.removed) - steps_ahead
        one = shape.forward_flops(Mask(), windows.seq_len) * windows.num_windows
        return one * max(0, candidates) * (left / num_blocks) / 2

    def _num_steps_left(self) -> int:
        removed, shape = len(self._strategy.removed), self._job.shape
        if self._config.num_remove is not None:
            return self._config.num_remove - removed
        assert self._config.ratio is not None
        candidates = self._config.blocks.candidates(shape.num_layers)
        mean = sum(shape.num_parameters_of(block) for block in candidates) / len(candidates) / shape.num_parameters
        return max(1, round((self._config.ratio - shape.ratio(self._strategy.mask)) / mean))
