"""Nodes that differ are named before any work is done."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockpruner.cluster.actor import ReplicaActor
from blockpruner.cluster.fleet_protocol import NodeUnfit
from blockpruner.cluster.preflight import check, differences, survey
from blockpruner.engine.errors import UserError
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.sections import ModelSource
from tests.conftest import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_two_looks_at_one_machine_are_equal(folder: Path) -> None:
    one, two = (survey(ModelSource(str(folder)), "cpu") for _ in range(2))
    check({"a": one, "b": two}, allow_mixed=False)
    assert one.device_bytes is None


def test_a_model_that_changed_has_another_fingerprint(folder: Path) -> None:
    source = ModelSource(str(folder))
    before = survey(source, "cpu")
    tiny_llama(torch.float16).save_pretrained(folder)
    found = differences(before, survey(source, "cpu"), allow_mixed=False)
    assert [text.partition(" ")[0] for text in found] == ["model"]


def test_a_model_that_is_missing_on_a_node_is_named_with_the_node(folder: Path) -> None:
    here = survey(ModelSource(str(folder)), "cpu")
    there = survey(ModelSource(str(folder) + "/gone"), "cpu")
    with pytest.raises(UserError, match=r"node b cannot read the model: .*gone.*does not exist"):
        check({"a": here, "b": there}, allow_mixed=False)


def test_all_nodes_that_differ_are_named_with_what_differs(folder: Path) -> None:
    here = survey(ModelSource(str(folder)), "cpu")
    nodes = {"a": here, "b": replace(here, torch="1.0"), "c": here, "d": replace(here, python="3.9", ray="2.0")}
    with pytest.raises(UserError) as caught:
        check(nodes, allow_mixed=True)
    assert "differ from a: b: torch is '1.0' there" in str(caught.value)
    assert "d: python is '3.9' there" in str(caught.value)
    assert "ray is '2.0' there" in str(caught.value)


def test_mixed_devices_are_refused_unless_allowed(folder: Path) -> None:
    here = survey(ModelSource(str(folder)), "cpu")
    nodes = {"a": here, "b": replace(here, hardware=("NVIDIA A100",))}
    with pytest.raises(UserError, match="`allow_mixed`"):
        check(nodes, allow_mixed=False)
    check(nodes, allow_mixed=True)


def test_a_replica_that_starts_later_looks_at_its_own_node(folder: Path) -> None:
    spec = ScoringSpec(model=ModelSource(str(folder)), dtype="float32", device="cpu", threads=1)
    here = survey(spec.model, "cpu")
    assert ReplicaActor().check(spec, here, allow_mixed=False) is spec
    with pytest.raises(NodeUnfit, match=r"it differs from the others: torch is '.*' there and '1\.0' elsewhere"):
        ReplicaActor().check(spec, replace(here, torch="1.0"), allow_mixed=True)


def test_how_much_memory_a_gpu_has_may_differ(folder: Path) -> None:
    here = survey(ModelSource(str(folder)), "cpu")
    check({"a": here, "b": replace(here, device_bytes=1)}, allow_mixed=False)
