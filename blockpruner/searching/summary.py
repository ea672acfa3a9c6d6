"""run.json: what a run has come to, in one object."""

from __future__ import annotations

from typing import Any

from blockpruner.engine.search.audit import most_misses
from blockpruner.engine.work.memory import Placement
from blockpruner.searching.config import BUDGET, FREE_ON_RESUME, SearchConfig
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import SPENT, RunDirectory


def write_summary(run: RunDirectory, config: SearchConfig, job: Job, status: str) -> dict[str, Any]:
    """Write and return run.json's content."""
    header = run.header
    assert header is not None
    steps, rounds, audits = run.steps, run.of_type("round"), run.of_type("audit")
    phases = run.phases
    dense = next((line for line in run.of_type("score") if line["step"] == 0), None)
    content = {
        "status": status,
        "model": config.model,
        "config": {**header["config"], **{name: config.to_json()[name] for name in FREE_ON_RESUME | BUDGET}},
        "versions": header["versions"],
        "dtype": header["dtype"],
        "device": header["device"],
        "kernel": run.kernel,
        "calibration": header["calibration"],
        "placement": (phases[-1] if phases else header).get("placement") or Placement.RESIDENT,
        "num_replicas": phases[-1]["num_replicas"] if phases else None,
        "num_parameters": job.shape.num_parameters,
        "num_layers": job.shape.num_layers,
        "dense": dense and {"nll": dense["nll"], "perplexity": dense["perplexity"]},
        "steps": steps,
        **({"rounds": rounds} if rounds else {}),
        **({"audit": summarize_audit(audits)} if audits else {}),
        "totals": {key: sum(phase[key] for phase in phases) for key in SPENT},
    }
    run.write_summary(content)
    return content


def summarize_audit(audits: list[dict[str, Any]]) -> dict[str, Any]:
    misses = [audit for audit in audits if audit["chosen"] != audit["best"]]
    return {
        "num_audited": len(audits),
        "num_agreed": len(audits) - len(misses),
        "most_misses": most_misses(len(misses), len(audits)),
        **{key: sum(audit[key] for audit in audits) for key in SPENT},
        "steps": audits,
    }
