"""Writes run.json, the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockpruner.engine.search.audit import most_misses
from blockpruner.engine.work.memory import Placement
from blockpruner.searching.config import BUDGET, FREE_ON_RESUME, SearchConfig
from blockpruner.searching.content import RefitSummary, RunSummary
from blockpruner.searching.history import History
from blockpruner.searching.records import AuditRecord, ChannelsRecord, CompensationRecord, RoundRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.steps import SPENT, timed


def write_summary(run: RunDirectory, config: SearchConfig, job: Job, status: str) -> RunSummary:
    """Write run.json and return its content."""
    free = {name: config.to_json()[name] for name in FREE_ON_RESUME | BUDGET}
    shape = {"num_parameters": job.shape.num_parameters, "num_layers": job.shape.num_layers}
    summary = summary_of(run, status=status, free=free, shape=shape)
    run.write_summary(summary)
    return summary


def summary_of(run: History, *, status: str, free: Mapping[str, Any], shape: Mapping[str, int]) -> RunSummary:
    """Return the content of run.json. All of it but the arguments is in the ledger.

    free: the options that may change on resume. shape: num_parameters and num_layers.
    """
    header, kernel, dense = run.header, run.kernel, run.dense
    assert header is not None
    assert kernel is not None
    last = run.phases[-1] if run.phases else None
    rounds, audits, refits = run.all(RoundRecord), run.all(AuditRecord), run.all(CompensationRecord)
    recorded = {"num_parameters": header.num_parameters, "num_layers": header.num_layers}
    content: Any = {
        "status": status,
        "model": header.config["model"],
        **({} if header.fingerprint is None else {"fingerprint": header.fingerprint}),
        "config": {**header.config, **free},
        "versions": header.versions,
        "dtype": header.dtype,
        "device": header.device,
        "kernel": kernel.to_json(),
        "calibration": header.calibration,
        "placement": (last.placement if last else header.placement) or Placement.RESIDENT,
        "num_replicas": last.num_replicas if last else None,
        **{name: recorded[name] or value for name, value in shape.items()},
        **({"mixers": header.mixers} if header.mixers else {}),
        **({"missing": header.missing} if header.missing else {}),
        **({"channels": channels[0].values()} if (channels := run.all(ChannelsRecord)) else {}),
        **({"times": header.times} if header.times else {}),
        **({"times_setting": header.times_setting} if header.times_setting else {}),
        "dense": dense and {"nll": dense.nll, "perplexity": dense.perplexity},
        "steps": timed(run.steps, header.times) if header.times else run.steps,
        **({"rounds": [each.values() for each in rounds]} if rounds else {}),
        **({"refits": [_summarize_refit(each) for each in refits]} if refits else {}),
        **({"audit": summarize_audit(audits)} if audits else {}),
        "totals": {key: sum(getattr(phase, key) for phase in run.phases) for key in SPENT},
    }
    summary: RunSummary = content
    return summary


def _summarize_refit(record: CompensationRecord) -> RefitSummary:
    return {
        "step": record.step,
        "nll": record.nll,
        "perplexity": record.perplexity,
        "num_tokens": record.num_tokens,
        "is_used": record.is_used,
        "wall_s": record.wall_s,
    }


def summarize_audit(audits: Sequence[AuditRecord]) -> dict[str, Any]:
    misses = [audit for audit in audits if audit.chosen != audit.best]
    return {
        "num_audited": len(audits),
        "num_agreed": len(audits) - len(misses),
        "most_misses": most_misses(len(misses), len(audits)),
        **{key: sum(getattr(audit, key) for audit in audits) for key in SPENT},
        "steps": [audit.values() for audit in audits],
    }
