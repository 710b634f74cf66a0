"""What all tests share: one Ray for the whole session, started by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .toys import make_toy_shards


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs: two training workers, and two left for Ray Data."""
    from lvm_ray import ray_session

    ray_session.start(2)
    yield
    ray_session.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the toy recipe's data set, to read."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_toy_shards(folder)
    return str(folder)
