"""Repeats some steps of a search exhaustively."""

from __future__ import annotations

from contextlib import suppress

from blockpruner.engine.blocks import Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.audit import audit, audited_steps
from blockpruner.engine.search.oracle import Found
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.oracle import RunOracle
from blockpruner.searching.records import AuditRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.scores import KernelChanged, Scores
from blockpruner.searching.summary import write_summary
from blockpruner.searching.telling import Telling


def run_audit(
    config: SearchConfig,
    job: Job,
    run: RunDirectory,
    scores: Scores,
    oracle: RunOracle,
    telling: Telling,
    found: Found,
) -> None:
    """Audit the number of steps that the config sets. Steps that were audited before are skipped."""
    assert config.audit is not None
    num_steps = len(found.blocks)
    number = min(config.audit, num_steps)
    if number < config.audit:  # the number of steps for a ratio is known only now
        telling.note(f"note: `audit={config.audit}` exceeds the {number} steps, so all of them will be audited")

    def score_again(step: int, masks: list[Mask]) -> list[Score]:
        while True:
            scores.enter(-step)
            with suppress(KernelChanged):
                return scores.of(masks)

    done = {record.step for record in run.all(AuditRecord)}
    steps = [step for step in audited_steps(num_steps, number, config.seed) if step not in done]
    for result in audit(job.space, found, scores.dense, steps, score_again):
        scores.enter(-result.step)
        record = AuditRecord.of(
            step=result.step,
            chosen=result.chosen.to_json(),
            best=result.best.to_json(),
            regret=result.regret,
            **oracle.spent(result.masks),
        )
        run.append(record)
        telling.audit(record, str(result.chosen), str(result.best))
        write_summary(run, config, job, "running")
