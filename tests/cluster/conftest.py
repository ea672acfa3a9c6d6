"""One Ray for all tests of this folder that need one, as the program starts it."""

from collections.abc import Iterator

import pytest

from cluster.session import ray_session


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_session(None, num_cpus=4):
        yield
