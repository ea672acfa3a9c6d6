"""The sweep over all families notices what is wrong. All of it takes too long for this suite: `make families`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockpruner.engine.model.selecting import Selector
from tests.families.checking import check_family
from tests.families.configs import all_names, has_parts


def test_a_right_family_is_right_and_a_refused_one_says_why(tmp_path: Path) -> None:
    assert check_family("llama", tmp_path).state == "right"
    refused = check_family("gemma3n_text", tmp_path)
    assert (refused.state, "4 dimensions" in refused.why) == ("refused", True)


def test_a_wrong_score_is_noticed_by_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that leaves a little behind, and a check at loading that sees nothing."""
    monkeypatch.setattr("tests.families.checking.check_removable", lambda decoder: None)
    monkeypatch.setattr("tests.families.checking.rehearse", lambda skeleton, source: "")
    plain = Selector.__call__

    def leaves_a_little(self: Selector, *args: object, **kwargs: object) -> object:
        output = plain(self, *args, **kwargs)
        return (output[0] + 1e-3, *output[1:]) if isinstance(output, tuple) and self.choice is not None else output

    monkeypatch.setattr(Selector, "__call__", leaves_a_little)
    found = check_family("llama", tmp_path)
    assert found.state == "wrong"
    assert "the score of" in found.why


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in all_names() if not has_parts(name)])
def test_no_family_is_wrong_or_gives_a_traceback(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert check_family(name, tmp_path).state in ("right", "refused", "not testable")
