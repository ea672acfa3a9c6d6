"""Task scores from lm-eval's own `evaluate`, which makes the requests and computes the scores. The answers may come
from any source.

The settings are the defaults of lm-eval's `simple_evaluate`, which is not called, since after each evaluation it asks
git, pip and the drivers about this machine: seconds, and git's complaint in a folder that is no repository.
"""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from blockpruner.engine.errors import UserError, first_line

PRESETS = {
    "paper": ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"),
    "paper-more": ("swag", "truthfulqa_mc1", "openbookqa", "race"),
    "paper-aqua": ("agieval_aqua_rat",),
}
"""Task lists of the paper: Table 1, the additional tasks of Table 10, and Table 8."""

Answer = Callable[[str, Sequence[Instance]], list[Any]]
"""Function from a type of request (`loglikelihood`, `loglikelihood_rolling`, `generate_until`) and requests to
answers."""


class Tasks:
    """Tasks that are known to exist and whose data can be read."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """names: tasks, groups, tags, or keys of PRESETS. include_path: folder with additional task files.

        Raises UserError if a task is unknown or its data is not available.
        """
        if include_path is not None and not include_path.is_dir():
            raise UserError(f"expected `include_path` to be a folder with task files, got {str(include_path)!r}.")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        names = list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
        self._manager = _manager(names, include_path)
        items = [item for name in names for item in self._load(name)]
        try:
            self._tasks = self._manager.load(items)
        except ValueError as error:  # a group together with one of its members
            raise UserError(f"expected each task once in `tasks`: {first_line(error)}") from error
        for name, task in self._tasks["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"task {name!r} runs code written by the model or needs image input; neither is done here."
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def _load(self, name: str) -> list[Task | Group]:
        if name not in self._manager.all_tasks:
            near = difflib.get_close_matches(name, [*PRESETS, *self._manager.all_tasks], n=3, cutoff=0.5)
            meant = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them all."
            raise UserError(f"expected a task that lm-eval knows, got {name!r}; {meant}")
        try:
            found = self._manager.load([name])
        except ConnectionError as error:
            raise UserError(
                f"task {name!r} takes its data from the Hugging Face hub, which is not reachable "
                f"({first_line(error)}); go online, or give task files for local data with `include_path`."
            ) from error
        except Exception as error:  # task files can run any code
            raise UserError(
                f"cannot load task {name!r}, whose files fail with {type(error).__name__}: {first_line(error)}; "
                f"correct them, or leave it out of `tasks`."
            ) from error
        return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())

    def evaluate(self, answer: Answer, limit: int | None = None) -> TaskScores:
        """Evaluate zero-shot, unless a task specifies otherwise. limit: use only the first N questions of each task."""
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        found = evaluate(_Answering(answer), self._tasks, limit=limit, log_samples=True)
        assert found is not None
        return TaskScores(found)


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return a manager that knows the given tasks. Indexing lm-eval's own tasks takes seconds, so it is done only if
    needed."""
    if include_path is None:
        return TaskManager()
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        try:
            for name in names:
                manager.load([name])
        except ConnectionError:  # reported later, with the task's name
            return manager
        except Exception:  # a group may have members among lm-eval's own tasks
            return TaskManager(include_path=str(include_path))
        return manager
    return TaskManager(include_path=str(include_path))


class TaskScores:
    """Scores from lm-eval.

    `tasks`: for each task, `acc`, `acc_norm`, the `score` (see `score_metric`), its `stderr`, and all `metrics`.
    `average`: mean of the scores. `samples`: one row per question and metric.
    """

    def __init__(self, found: Any) -> None:
        self.tasks = {name: _scores(values) for name, values in {**found["results"], **found.get("groups", {})}.items()}
        scores = {name: values["score"] for name, values in self.tasks.items() if values["score"] is not None}
        # If a group has a score, do not count its members.
        members = {task for name in scores for task in _below(name, found["group_subtasks"])}
        known = [score for name, score in scores.items() if name not in members]
        self.average = sum(known) / len(known) if known else None
        self.samples = [
            {"task": name, "question": sample["doc_id"], "metric": metric, "value": float(sample[key])}
            for name, samples in found["samples"].items()
            for sample in samples
            for key in sample["metrics"]
            for metric in [_named(key, sample["filter"])]
            if isinstance(sample[key], int | float)
        ]


def score_metric(metrics: Container[str]) -> str | None:
    """Return the metric that is a task's score, as in the paper: `acc_norm` if available, else `acc`."""
    return next((name for name in ("acc_norm", "acc") if name in metrics), None)


def _below(group: str, members: dict[str, list[str]]) -> set[str]:
    """Return all tasks and groups below a group."""
    direct = members.get(group, [])
    return {*direct, *(name for member in direct for name in _below(member, members))}


def _named(metric: str, filter_name: str) -> str:
    """Return the name of a metric with its filter, if it has one."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _scores(values: dict[str, Any]) -> dict[str, Any]:
    """Convert lm-eval's values, with keys such as `acc,none` and `acc_stderr,none`."""
    metrics = {_named(*key.split(",", 1)): v for key, v in values.items() if "," in key and isinstance(v, int | float)}
    counts = score_metric(metrics)
    return {
        "acc": metrics.get("acc"),
        "acc_norm": metrics.get("acc_norm"),
        "stderr": metrics.get(f"{counts}_stderr"),
        "score": metrics.get(counts) if counts else None,
        "metrics": metrics,
    }


class _Answering(LM):  # type: ignore[misc]
    """lm-eval's model interface for any source of answers."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)
