"""Numbers about a run for dashboards. Ray exports them for Prometheus; its dashboard and Grafana draw them."""

from __future__ import annotations

COUNTED = {
    "units_done": "Units of work done",
    "windows_done": "Windows that a search has scored, once for each mask",
    "deaths": "Replicas lost, because they died or their node was lost",
}
SHOWN = {
    "queue_length": "Units of work that wait for a replica",
    "replicas": "Replicas that are ready",
    "best_perplexity": "Perplexity after the last removal or round of a search",
}


class Metrics:
    """Keeps nothing: for runs without Ray."""

    def count(self, name: str, number: int = 1) -> None:
        """Add to one of COUNTED."""

    def show(self, name: str, value: float) -> None:
        """Replace one of SHOWN."""


class RayMetrics(Metrics):
    """Hands the numbers to Ray, which must be running. Ray drops them if it was installed without its dashboard."""

    def __init__(self, run: str) -> None:
        """run: name of the run, by which dashboards tell runs apart."""
        from ray.util.metrics import Counter, Gauge

        tags = {"run": run.encode("ascii", "backslashreplace").decode()}  # Ray takes nothing else
        self._counters = {name: Counter(f"blockpruner_{name}", about, ("run",)) for name, about in COUNTED.items()}
        self._gauges = {name: Gauge(f"blockpruner_{name}", about, ("run",)) for name, about in SHOWN.items()}
        for metric in (*self._counters.values(), *self._gauges.values()):
            metric.set_default_tags(tags)

    def count(self, name: str, number: int = 1) -> None:
        self._counters[name].inc(number)

    def show(self, name: str, value: float) -> None:
        self._gauges[name].set(value)
