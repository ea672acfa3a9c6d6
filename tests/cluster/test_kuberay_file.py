"""examples/kuberay.yaml, as far as it can be checked without Kubernetes: KubeRay's schema is not to be had offline."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from blockpruner import cli
from tests.cluster.test_cluster_file import setting, without

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY / "examples" / "kuberay.yaml"
RAY = re.findall(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[0]

# The fields of KubeRay's types that the manifest may use.
JOB = {"entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds",
       "backoffLimit", "rayClusterSpec"}  # fmt: skip
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
           "workerGroupSpecs"}  # fmt: skip
HEAD = {"rayStartParams", "template"}
WORKER = HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}

Manifest = dict[str, Any]


@pytest.fixture
def manifest() -> Manifest:
    content: Manifest = yaml.safe_load(FILE.read_text())
    return content


def groups(manifest: Manifest) -> list[Manifest]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(manifest: Manifest) -> list[Manifest]:
    return [container for group in groups(manifest) for container in group["template"]["spec"]["containers"]]


# ---- the checks: each raises AssertionError ------------------------------------------------------------------------


def it_is_a_ray_job_of_known_fields(manifest: Manifest) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,46}[a-z0-9])?", manifest["metadata"]["name"]), "pods are named after it"
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["spec"].keys() <= JOB
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster.keys() <= CLUSTER
    assert cluster["headGroupSpec"].keys() == HEAD
    assert all(worker.keys() == WORKER for worker in cluster["workerGroupSpecs"])
    assert all(isinstance(value, str) for group in groups(manifest) for value in group["rayStartParams"].values())


def ray_is_the_tested_one(manifest: Manifest) -> None:
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == RAY
    assert {container["image"].rpartition("-ray")[2] for container in containers(manifest)} == {RAY}


def the_command_is_one_of_ours(manifest: Manifest) -> None:
    program, command, _, *options = manifest["spec"]["entrypoint"].split()
    assert program == "blockpruner"
    ours: Any = typer.main.get_command(cli.app)
    known = {name for parameter in ours.commands[command].params for name in parameter.opts}
    assert {option for option in options if option.startswith("--")} <= known
    assert not re.search(r"[;&|]", manifest["spec"]["entrypoint"])


def pods_ask_for_what_they_may_use_and_mount_what_there_is(manifest: Manifest) -> None:
    for group in groups(manifest):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert "shm" in volumes
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def workers_come_from_nothing_and_the_head_does_no_work(manifest: Manifest) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert cluster["enableInTreeAutoscaling"] is True
    for worker in cluster["workerGroupSpecs"]:
        assert worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"]
        assert "nvidia.com/gpu" in worker["template"]["spec"]["containers"][0]["resources"]["limits"]


def the_cluster_demands_a_token_and_goes_at_the_end(manifest: Manifest) -> None:
    assert manifest["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True


# ---- each check with a manifest that it must refuse ----------------------------------------------------------------

CLUSTER_AT = ("spec", "rayClusterSpec")
WORKER_AT = (*CLUSTER_AT, "workerGroupSpecs", 0)
CONTAINER_AT = (*WORKER_AT, "template", "spec", "containers", 0)
REFUSED: list[tuple[Callable[[Manifest], None], str, Callable[[Manifest], None]]] = [
    (it_is_a_ray_job_of_known_fields, "another version", setting("ray.io/v1alpha1", "apiVersion")),
    (it_is_a_ray_job_of_known_fields, "a misspelt field", setting(600, "spec", "ttlSecondsAfterFinish")),
    (it_is_a_ray_job_of_known_fields, "a number for Ray", setting(0, *WORKER_AT, "rayStartParams", "num-cpus")),
    (ray_is_the_tested_one, "another Ray", setting("2.9.0", *CLUSTER_AT, "rayVersion")),
    (ray_is_the_tested_one, "another image", setting("REGISTRY/blockpruner:latest", *CONTAINER_AT, "image")),
    (the_command_is_one_of_ours, "a misspelt option",
     setting("blockpruner search m --replica 4", "spec", "entrypoint")),
    (the_command_is_one_of_ours, "two commands", setting("blockpruner search m && ls", "spec", "entrypoint")),
    (pods_ask_for_what_they_may_use_and_mount_what_there_is, "limits alone",
     without(*CONTAINER_AT, "resources", "requests", "cpu")),
    (pods_ask_for_what_they_may_use_and_mount_what_there_is, "no such volume",
     setting("data", *CONTAINER_AT, "volumeMounts", 0, "name")),
    (workers_come_from_nothing_and_the_head_does_no_work, "a worker that stays", setting(1, *WORKER_AT, "minReplicas")),
    (workers_come_from_nothing_and_the_head_does_no_work, "replicas on the head",
     setting({}, *CLUSTER_AT, "headGroupSpec", "rayStartParams")),
    (the_cluster_demands_a_token_and_goes_at_the_end, "open to all", setting({}, *CLUSTER_AT, "authOptions")),
    (the_cluster_demands_a_token_and_goes_at_the_end, "it stays", setting(False, "spec", "shutdownAfterJobFinishes")),
]  # fmt: skip
CHECKS = list(dict.fromkeys(check for check, _, _ in REFUSED))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_manifest_is_sound(manifest: Manifest, check: Callable[[Manifest], None]) -> None:
    check(manifest)


@pytest.mark.parametrize(
    ("check", "change"),
    [(check, change) for check, _, change in REFUSED],
    ids=[f"{check.__name__}-{name}" for check, name, _ in REFUSED],
)
def test_a_broken_manifest_is_noticed(
    manifest: Manifest, check: Callable[[Manifest], None], change: Callable[[Manifest], None]
) -> None:
    broken = copy.deepcopy(manifest)
    change(broken)
    assert broken != manifest
    with pytest.raises(AssertionError):
        check(broken)


def test_what_is_written_about_the_image_names_the_tested_ray() -> None:
    for file in (FILE, REPOSITORY / "docs" / "cluster.md"):
        assert re.findall(r"FROM rayproject/ray:([\d.]+)-", file.read_text()) == [RAY]
