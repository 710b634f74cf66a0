"""What all tests share: one Ray for the whole session, started by the first test that needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs: two training workers, and two left for Ray Data."""
    from lvm_ray import ray_session

    ray_session.start(2)
    yield
    ray_session.shutdown()
