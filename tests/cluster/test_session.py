"""Starting Ray for a run and leaving nothing behind, twice in one process."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blockpruner.cluster.session import ray_session
from blockpruner.engine.errors import UserError

SCRIPT = """
import json, os
from blockpruner.cluster.session import ray_session
before = dict(os.environ)
seen = []
for _ in range(2):
    with ray_session(None, num_cpus=1):
        import ray
        seen.append(ray.get(ray.remote(lambda: 7).remote()))
        token = os.environ["RAY_AUTH_TOKEN"]
print(json.dumps({"seen": seen, "same_environment": dict(os.environ) == before, "token_length": len(token)}))
"""


def test_a_session_can_be_opened_twice_and_leaves_the_environment_as_it_was() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"seen": [7, 7], "same_environment": True, "token_length": 64}


def test_an_address_where_nobody_answers_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="cannot reach a Ray cluster"), ray_session(f"127.0.0.1:{port}", 1):
        pass


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:many", "ray://127.0.0.1:10001"])
def test_a_word_that_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="expected"), ray_session(address, 1):
        pass
