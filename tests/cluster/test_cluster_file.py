"""ray_cluster.yaml, as far as it can be checked without a cloud, and the launcher that `ray submit` uploads."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER_FILE = REPOSITORY / "ray_cluster.yaml"
TOKEN = "~/.ray/auth_token"
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
START = COMMANDS[-2:]

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    content: Config = yaml.safe_load(CLUSTER_FILE.read_text())
    return content


def ray_folder() -> Path:
    """Found without `import ray`, which must not happen in this process before `ray_session` sets the environment."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def commands(config: Config, *lists: str) -> str:
    return "\n".join(command for name in lists or COMMANDS for command in config[name])


# ---- the checks: each raises AssertionError ------------------------------------------------------------------------


def rays_schema(config: Config) -> None:
    """Ray's published schema for the file as it is, and Ray's own check of what it makes of the file."""
    check = (
        "import json, sys; from jsonschema import validate; "
        "from ray.autoscaler._private.util import prepare_config, validate_config; "
        "config = json.load(sys.stdin); validate(config, json.load(open(sys.argv[1]))); "
        "validate_config(prepare_config(config))"
    )
    schema = str(ray_folder() / "autoscaler" / "ray-schema.json")
    done = subprocess.run(
        [sys.executable, "-c", check, schema], input=json.dumps(config), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def nothing_is_left_to_rays_defaults(config: Config) -> None:
    """The defaults install a nightly build of Ray and open the dashboard to everybody."""
    defaults = yaml.safe_load((ray_folder() / "autoscaler" / "aws" / "defaults.yaml").read_text())
    assert defaults.keys() <= config.keys()
    assert set(COMMANDS) <= config.keys()
    assert all("ray start " in commands(config, name) for name in START)
    assert all(node["node_config"].get("ImageId") for node in config["available_node_types"].values())


def nothing_listens_everywhere(config: Config) -> None:
    assert "0.0.0.0" not in commands(config)
    assert "--dashboard-host=127.0.0.1" in commands(config, "head_start_ray_commands")


def ray_is_the_tested_one(config: Config) -> None:
    tested = re.findall(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"\bray(?:\[\w+\])?==([\w.]+)", commands(config)) == tested
    assert "-c ~/blockpruner/constraints.txt" in commands(config, "setup_commands")


def python_is_pinned_once(config: Config) -> None:
    versions = re.findall(r"--python (\d\S*)", commands(config))
    assert len(versions) == 1
    assert re.fullmatch(r"3\.\d+\.\d+", versions[0]), "Ray compares patch levels, too"


def all_of_ray_demands_the_token(config: Config) -> None:
    for name in START:
        start = next(command for command in config[name] if "ray start " in command)
        assert re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start ", start)
    assert config["file_mounts"].get(TOKEN) == TOKEN
    assert f"chmod 600 {TOKEN}" in commands(config, "setup_commands")


def usage_is_not_reported(config: Config) -> None:
    assert all("RAY_USAGE_STATS_ENABLED=0" in commands(config, name) for name in START)
    assert "--disable-usage-stats" in commands(config, "head_start_ray_commands")


def file_mounts_exist(config: Config) -> None:
    assert all((REPOSITORY / source).exists() for source in config["file_mounts"].values() if source != TOKEN)


def the_mounts_are_enough_to_install(config: Config) -> None:
    """What pyproject.toml names, and the folders that setuptools is told to look for."""
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "blockpruner", "engine", "cluster"}
    assert {f"~/blockpruner/{name}": name for name in needed}.items() <= config["file_mounts"].items()


def an_earlier_build_is_not_installed_again(config: Config) -> None:
    """Ray copies files with their old dates, and setuptools takes what is newer in its own folder."""
    install = next(command for command in config["setup_commands"] if command.endswith(" ~/blockpruner"))
    assert install.startswith("rm -rf ~/blockpruner/build;")
    assert "--reinstall-package blockpruner" in install


def the_head_does_no_work(config: Config) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}


def workers_come_from_nothing(config: Config) -> None:
    workers = [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]
    assert workers
    assert all(node["min_workers"] == 0 and node["resources"]["GPU"] >= 1 for node in workers)
    assert config["max_workers"] >= 1
    assert config["upscaling_speed"] >= config["max_workers"]
    assert "--autoscaling-config=" in commands(config, "head_start_ray_commands")


def nodes_have_room(config: Config) -> None:
    for node in config["available_node_types"].values():
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 200
    assert all("ulimit -n 65536" in commands(config, name) for name in START)


def what_is_big_stays_here_and_weights_can_travel(config: Config) -> None:
    assert {".git", ".venv"} <= set(config["rsync_exclude"])
    assert not any("safetensors" in pattern for pattern in config["rsync_exclude"]), "rsync-down would leave them out"


def no_secret_is_written_down(config: Config) -> None:
    secret = r"hf_\w{8}|AKIA\w{8}|PRIVATE KEY|[0-9a-f]{32}|\w*(SECRET|TOKEN|PASSWORD)\w*="
    assert not re.search(secret, json.dumps(config))


# ---- each check with a file that it must refuse --------------------------------------------------------------------


def without(*path: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


def setting(value: Any, *path: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def replacing(old: str, new: str, *lists: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        assert old in commands(config, *lists)
        for name in lists or COMMANDS:
            config[name] = [command.replace(old, new) for command in config[name]]

    return change


WORKER_START, HEAD_START = "worker_start_ray_commands", "head_start_ray_commands"
GPU = ("available_node_types", "gpu")
HEAD = ("available_node_types", "head")
REFUSED: list[tuple[Callable[[Config], None], str, Callable[[Config], None]]] = [
    (rays_schema, "a misspelt field", setting(10, "idle_timeout_minute")),
    (rays_schema, "half a GPU", setting(0.5, *GPU, "resources", "GPU")),
    *((nothing_is_left_to_rays_defaults, f"no {name}", without(name)) for name in COMMANDS),
    (nothing_is_left_to_rays_defaults, "no rsync_exclude", without("rsync_exclude")),
    (nothing_is_left_to_rays_defaults, "Ray's image", without(*GPU, "node_config", "ImageId")),
    (nothing_is_left_to_rays_defaults, "nothing started", setting([], WORKER_START)),
    (nothing_listens_everywhere, "an open dashboard", replacing("127.0.0.1", "0.0.0.0", HEAD_START)),
    (nothing_listens_everywhere, "Ray's choice of host", replacing("--dashboard-host=127.0.0.1", "", HEAD_START)),
    (ray_is_the_tested_one, "another Ray", replacing("==2.", "==1.", "setup_commands")),
    (ray_is_the_tested_one, "any Ray", replacing("ray[default]==", "ray[default]>=", "setup_commands")),
    (ray_is_the_tested_one, "no constraints", replacing("-c ~/blockpruner/constraints.txt", "", "setup_commands")),
    (python_is_pinned_once, "any patch level", replacing("3.11.18", "3.11", "setup_commands")),
    (python_is_pinned_once, "twice", lambda config: config["worker_setup_commands"].append("uv venv --python 3.11.9")),
    (all_of_ray_demands_the_token, "no mode on the head", replacing("RAY_AUTH_MODE=token", "", HEAD_START)),
    (all_of_ray_demands_the_token, "no mode on workers", replacing("RAY_AUTH_MODE=token", "", WORKER_START)),
    (all_of_ray_demands_the_token, "no token", without("file_mounts", TOKEN)),
    (all_of_ray_demands_the_token, "a token for all to read", replacing("chmod 600", "true", "setup_commands")),
    (usage_is_not_reported, "reports by workers", replacing("RAY_USAGE_STATS_ENABLED=0", "", WORKER_START)),
    (usage_is_not_reported, "reports by the head", replacing("--disable-usage-stats", "", HEAD_START)),
    (file_mounts_exist, "a folder that is gone", setting("pruner", "file_mounts", "~/blockpruner/pruner")),
    (the_mounts_are_enough_to_install, "no engine", without("file_mounts", "~/blockpruner/engine")),
    (an_earlier_build_is_not_installed_again, "old modules", replacing("rm -rf", "ls", "setup_commands")),
    (an_earlier_build_is_not_installed_again, "what is there is enough",
     replacing("--reinstall-package blockpruner", "", "setup_commands")),
    (the_head_does_no_work, "replicas on the head", setting(4, *HEAD, "resources", "CPU")),
    (the_head_does_no_work, "what AWS says", setting({}, *HEAD, "resources")),
    (workers_come_from_nothing, "a worker that always runs", setting(1, *GPU, "min_workers")),
    (workers_come_from_nothing, "a worker without a GPU", setting(0, *GPU, "resources", "GPU")),
    (workers_come_from_nothing, "no autoscaler", replacing("--autoscaling-config=", "--x=", HEAD_START)),
    (workers_come_from_nothing, "one after the other", setting(1, "upscaling_speed")),
    (nodes_have_room, "few open files", replacing("ulimit -n 65536", "true", WORKER_START)),
    (nodes_have_room, "a small disk",
     setting({"VolumeSize": 8}, *GPU, "node_config", "BlockDeviceMappings", 0, "Ebs")),
    (what_is_big_stays_here_and_weights_can_travel, "the environment sent", setting([".git"], "rsync_exclude")),
    (what_is_big_stays_here_and_weights_can_travel, "weights lost",
     lambda config: config["rsync_exclude"].append("*.safetensors")),
    (no_secret_is_written_down, "a hub token",
     lambda config: config["setup_commands"].append("export HF_TOKEN=hf_abcdefghijklmnop")),
    (no_secret_is_written_down, "Ray's token",
     lambda config: config[HEAD_START].append(f"echo {'0123456789abcdef' * 4} > {TOKEN}")),
]  # fmt: skip
CHECKS = list(dict.fromkeys(check for check, _, _ in REFUSED))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_cluster_file_is_sound(config: Config, check: Callable[[Config], None]) -> None:
    check(config)


@pytest.mark.parametrize(
    ("check", "change"),
    [(check, change) for check, _, change in REFUSED],
    ids=[f"{check.__name__}-{name}" for check, name, _ in REFUSED],
)
def test_a_broken_cluster_file_is_noticed(
    config: Config, check: Callable[[Config], None], change: Callable[[Config], None]
) -> None:
    broken = copy.deepcopy(config)
    change(broken)
    assert broken != config
    with pytest.raises(AssertionError):
        check(broken)


def test_a_login_shell_on_a_node_finds_the_environment_and_the_mode(config: Config, tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)

    def login_shell(command: str) -> str:
        """As Ray runs a command through ssh; in a session of its own, for an interactive bash takes the terminal."""
        return subprocess.run(
            ["bash", "--login", "-c", "-i", f"source ~/.bashrc; ({command})"],
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            text=True, check=True,
        ).stdout  # fmt: skip

    for _ in range(2):  # `ray up` may run the commands again
        for command in config["setup_commands"]:
            if "blockpruner_env" in command:
                login_shell(command)
    assert (tmp_path / ".bashrc").read_text().count("blockpruner_env") == 1
    found = login_shell("command -v python; echo $RAY_AUTH_MODE $RAY_USAGE_STATS_ENABLED").splitlines()
    assert found == [str(tmp_path / "venv" / "bin" / "python"), "token 0"]


# ---- the launcher --------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The launcher alone in another folder, as `ray submit` leaves it, beside things that have the package's names."""
    launcher = Path(shutil.copy(REPOSITORY / "cluster" / "launcher.py", tmp_path))
    for name in ("blockpruner", "cluster", "engine", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is not the installed package')")

    def run(
        *arguments: str, python: Sequence[str] = (str(launcher),), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PYTHONPATH")}
        return subprocess.run(
            [sys.executable, *python, *arguments],
            cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_the_launcher_needs_only_the_installed_package(
    launch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = launch("search", "--help")
    assert done.returncode == 0, done.stderr
    assert "Find the order in which blocks can be removed." in done.stdout


def test_the_launcher_hands_its_arguments_on(launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = launch("search", "MODEL", "--out", "run", "--num-remove", "1", "--replicas", "several words")
    assert done.returncode == 2
    assert done.stderr == "error: expected --replicas to be auto or N, got 'several words'.\n"


@pytest.mark.parametrize(("chosen", "expected"), [({}, "auto"), ({"RAY_ADDRESS": "10.0.0.1:6379"}, "10.0.0.1:6379")])
def test_the_launcher_joins_the_cluster_that_it_runs_on_unless_another_is_chosen(
    launch: Callable[..., subprocess.CompletedProcess[str]], chosen: dict[str, str], expected: str
) -> None:
    """Looked at from within, since joining `auto` would find whatever Ray else runs on this machine."""
    within = (
        "import atexit, os, runpy; atexit.register(lambda: print('RAY_ADDRESS is', os.environ['RAY_ADDRESS'])); "
        "runpy.run_path('launcher.py', run_name='__main__')"
    )
    done = launch("search", "--help", python=["-c", within], **chosen)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"RAY_ADDRESS is {expected}"
