"""Any text for any option of any command: the command runs, or one line and exit code 2."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from blockpruner import cli
from blockpruner.comparing.config import CompareConfig
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Options
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.recovering.config import RecoverConfig
from blockpruner.searching.config import SearchConfig
from blockpruner.timing.config import LatencyConfig

FUNCTIONS = {
    "blockpruner.comparing.comparing.compare_methods",
    "blockpruner.evaluating.evaluating.evaluate_model",
    "blockpruner.exporting.exporting.export_model",
    "blockpruner.planning.planning.plan_search",
    "blockpruner.pruning.pruning.prune_model",
    "blockpruner.recovering.recovering.recover_model",
    "blockpruner.reporting.writing.write_report",
    "blockpruner.searching.driver.run_search",
    "blockpruner.serving.serve_check.check_serving",
    "blockpruner.timing.timing.measure_latency",
}
VALID = {
    "search": ["m", "--num-remove", "1", "--out", "o"],
    "prune": ["m", "--run", "r", "--num-remove", "1", "--out", "o"],
    "plan": ["m"],
    "report": ["r"],
    "evaluate": ["m", "--perplexity", "builtin"],
    "latency": ["m"],
    "recover": ["d", "--out", "o"],
    "export": ["d", "--out", "o"],
    "compare": ["m", "--out", "o"],
    "serve-check": ["d"],
}
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "0",
    "-1",
    "-0.0",
    "1e400",
    "1e-400",
    "1.5",
    "9" * 5000,
    "1_000",
    "٣",
    "0x10",
    "",
    " ",
    "true",
]
TEXTS = st.sampled_from(NUMBERS) | st.text(max_size=12) | st.floats().map(str) | st.integers().map(str)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FUNCTIONS:
        monkeypatch.setattr(name, lambda *given, **more: {"results": {}})


def _options(command: str) -> list[str]:
    import typer.main

    group: Any = typer.main.get_command(cli.app)
    return [one.opts[0] for one in group.commands[command].params if one.opts[0].startswith("--")]


CASES = [(command, option) for command in VALID for option in _options(command)]


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.sampled_from(CASES), text=TEXTS)
@example(case=("search", "--task-timeout-s"), text="nan")
@example(case=("search", "--resource-timeout-s"), text="-inf")
@example(case=("recover", "--seed"), text="-1")
def test_any_text_for_an_option_is_taken_or_refused_in_one_line(case: tuple[str, str], text: str) -> None:
    command, option = case
    given = [*VALID[command], f"{option}={text}"]
    done = CliRunner().invoke(cli.app, [command, *given], standalone_mode=False)
    wrong = type(done.exception).__mro__ if done.exception else ()
    if any(kind.__name__ == "ClickException" for kind in wrong):  # `main` prints these in one line
        assert done.exception.exit_code == 2  # type: ignore[union-attr]
        return
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.return_value in (None, 0, 2) or done.exit_code in (0, 2)
    assert len(done.stderr.splitlines()) <= 1
    assert not done.stderr or done.stderr.startswith("error: ")


KINDS: list[tuple[type[Options], dict[str, Any]]] = [
    (SearchConfig, {"model": "m", "num_remove": 1}),
    (EvaluationConfig, {"model": "m", "perplexity": ("builtin",)}),
    (CompareConfig, {"model": "m"}),
    (RecoverConfig, {"folder": "d"}),
    (LatencyConfig, {"model": "m"}),
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(KINDS), value=ANYTHING, data=st.data())
def test_any_value_from_python_is_an_option_or_one_line(
    kind: tuple[type[Options], dict[str, Any]], value: Any, data: st.DataObject
) -> None:
    config, valid = kind
    name = data.draw(st.sampled_from([*config.model_fields, "no such option"]))
    for make in (config, config.of):
        try:
            taken = getattr(make(**{**valid, name: value}), name)
        except UserError as error:
            message = str(error)
        else:
            message = ""
            assert not isinstance(taken, float) or math.isfinite(taken)
            assert isinstance(taken, bool) or not isinstance(value, bool)
        assert "\n" not in message
        assert len(message) < 1000
