"""The search: the strategy asks, the scorer answers, the ledger is written, the strategy is told."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.config import SearchConfig
from cluster.files import plain
from cluster.job import Job, prepare
from cluster.progress import Reporter
from cluster.replicas import Replicas, open_replicas
from cluster.run import RunDirectory, StepSums, score_record
from cluster.session import interruptible, ray_session
from engine.blocks import Block, Mask
from engine.calibration import Windows
from engine.errors import UserError
from engine.memory import Placement
from engine.scoring import OutOfMemory, Score
from engine.search.greedy import Candidate, Greedy
from engine.units import KernelShape, WorkUnit, split_work


def run_search(config: SearchConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Search, or go on with the search that `out` holds. Returns run.json's content.

    Raises UserError for what the user can mend, SearchFailed when no candidate has a finite perplexity, and
    KeyboardInterrupt after SIGINT or SIGTERM; the run then can be resumed.
    """
    with interruptible(), RunDirectory(out) as run, ExitStack() as stack:
        if run.header is not None:
            _check_same_config(config, run)
        if config.address is not None:
            stack.enter_context(ray_session(config.address))
        job = prepare(config, reporter)
        search = _Search(config, job, run, reporter)
        search.replay()
        if not search.is_finished:
            recorded = KernelShape(**run.kernel) if run.header else None
            with open_replicas(config, job, recorded, search.say) as replicas:
                if run.header is None:
                    run.append("run", _header(config, job, replicas))
                search.go_on(replicas)
        return search.summary("finished")


def _header(config: SearchConfig, job: Job, replicas: Replicas) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "dtype": job.dtype,
        "device": job.device,
        "kernel": replicas.kernel.to_json(),
        "placement": replicas.spec.placement,
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

    def __init__(self, config: SearchConfig, job: Job, run: RunDirectory, reporter: Reporter) -> None:
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
            self._strategy.accept(Block.from_json(step["block"]))
        self._reporter.say(f"resuming {self._run.path} after step {len(steps)}")

    def say(self, text: str) -> None:
        """To the person, and to the timeline."""
        self._reporter.say(text)
        self._run.append_event("note", {"at_s": time.time(), "text": text})

    def go_on(self, replicas: Replicas) -> None:
        self._replicas = replicas
        try:
            with self._reporter.bar("search", self._expected_flops()):
                self._score_dense()
                while candidates := self._strategy.ask():
                    self._step(candidates)
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
            "kernel": self._run.kernel,
            "calibration": header["calibration"],
            "placement": (steps[-1] if steps else header).get("placement", Placement.RESIDENT),
            "num_replicas": steps[-1]["num_replicas"] if steps else None,
            "num_parameters": self._job.shape.num_parameters,
            "num_layers": self._job.shape.num_layers,
            "dense": dense and {"nll": dense["nll"], "perplexity": dense["perplexity"]},
            "steps": steps,
            "totals": {key: sum(step[key] for step in steps) for key in ("work_flops", "naive_work_flops", "wall_s")},
        }
        self._run.write_summary(content)
        return content

    def _score_dense(self) -> None:
        """Score the model as it is. A resumed run does it again and must get the same bits: else the model, the
        libraries or the processor are not those of the first part."""
        earlier = self._run.unit_results(0).sums.get(Mask(), {})
        kernel = self._replicas.kernel
        score = self._score(0, [Mask()], known=StepSums())[0]
        if self._replicas.kernel != kernel:
            earlier = {}  # memory ran out, and in another kernel shape the bits are others
        # A sum that is not finite is recorded as missing: JSON has no NaN.
        if any(plain(score.window_sums[window]) != plain(value) for window, value in earlier.items()):
            raise UserError(
                f"the dense model scores {score.nll!r} here, not what {str(self._run.path)!r} recorded: the model, the "
                f"library versions or the processor differ. Resume it where it began, or choose another --out."
            )
        self._record_scores(0, {None: score})
        self._reporter.say(f"dense: perplexity {score.perplexity:.4f}")
        self.summary("running")

    def _step(self, candidates: Sequence[Candidate]) -> None:
        number = len(self._strategy.removed) + 1
        shape, windows = self._job.shape, self._job.windows
        masks = [candidate.mask for candidate in candidates]
        scores = self._score(number, masks, known=self._run.unit_results(number))
        self._record_scores(number, {item.block: score for item, score in zip(candidates, scores, strict=True)})
        best = self._strategy.tell(candidates, [score.nll for score in scores])
        flops, wall_s = self._run.spent(number)
        naive = windows.num_windows * sum(shape.forward_flops(mask, windows.seq_len) for mask in masks)
        scorer = self._replicas.scorer
        step = {
            "step": number,
            "block": candidates[best].block.to_json(),
            "nll": scores[best].nll,
            "perplexity": scores[best].perplexity,
            "ratio": shape.ratio(self._strategy.mask),
            "num_candidates": len(candidates),
            "num_scored": len(scores),
            "work_flops": flops,
            "naive_work_flops": naive,
            "wall_s": wall_s,
            "num_replicas": scorer.num_replicas,
            "num_lost": scorer.num_lost,
            "placement": self._replicas.spec.placement,
        }
        self._run.append("step", step)
        self._reporter.expect(self._expected_flops(), f"step {number + 1}")
        total = f"{'about ' if self._config.ratio else ''}{number + self._strategy.num_steps_left()}"
        lost = f" ({scorer.num_lost} lost)" if scorer.num_lost else ""
        self._reporter.say(
            f"step {number} of {total}: {candidates[best].block} removed, perplexity {step['perplexity']:.4f}, ratio "
            f"{step['ratio']:.4f}, {len(scores)} candidates in {step['wall_s']:.1f} s on {scorer.num_replicas} "
            f"replica{'s' * (scorer.num_replicas > 1)}{lost}, ETA {self._reporter.eta}"
        )
        self.summary("running")

    def _record_scores(self, step: int, scores: Mapping[Block | None, Score]) -> None:
        """Write `score` lines, but for those that an interrupted session wrote before."""
        sums = self._run.unit_results(step)
        written = {line["mask"] for line in self._run.lines if line["type"] == "score" and line["step"] == step}
        for block, score in scores.items():
            if str(score.mask) not in written:
                self._run.append("score", score_record(step, block, score, sums))

    def _units(self, masks: Sequence[Mask]) -> list[WorkUnit]:
        return split_work(
            masks,
            self._job.shape,
            self._replicas.kernel,
            num_windows=self._job.windows.num_windows,
            seq_len=self._job.windows.seq_len,
            num_replicas=self._replicas.scorer.num_replicas,
        )

    def _score(self, step: int, masks: Sequence[Mask], known: StepSums) -> list[Score]:
        """Score masks, in their order. Units that the ledger knows are not done again.

        When a device runs out of memory, the kernel shape is halved and the step starts again: calls of another size
        may give other bits, and the scores of a step must be comparable.
        """
        windows = self._job.windows
        while failed := self._score_once(step, masks, known):
            kernel = self._replicas.shrink(self._replicas.kernel, failed.reason, self.say)
            self._run.append("kernel", kernel.to_json())
            self._replicas.kernel = kernel
            self._replicas.scorer.use(kernel)
            known = StepSums()
            if step > 0:  # a resumed run compares the dense model's bits, which may be others now
                self._score(0, [Mask()], known=StepSums())
        return [
            Score(mask, tuple(known.sums[mask][window] for window in range(windows.num_windows)), windows.seq_len - 1)
            for mask in masks
        ]

    def _score_once(self, step: int, masks: Sequence[Mask], known: StepSums) -> OutOfMemory | None:
        """Add the sums of all units that are missing; returns a unit that did not fit the memory, if any."""
        units = [unit for unit in self._units(masks) if not known.has(unit.masks, unit.first, unit.stop)]
        failed: OutOfMemory | None = None
        before = time.perf_counter()
        for result in self._replicas.scorer.run(units):
            if isinstance(result, OutOfMemory):
                failed = result
                continue
            unit = result.unit
            known.add(unit.masks, unit.first, unit.stop, result.sums, result.seconds, result.replica)
            now = time.perf_counter()
            self._run.append_unit(step, result, wall_s=now - before)
            before = now
            self._reporter.advance(unit.flops)
        return failed

    def _expected_flops(self) -> float:
        """Work of this session as far as it can be foreseen."""
        windows = self._job.windows
        return self._reporter.done + windows.num_windows * self._strategy.expected_flops(windows.seq_len)
