"""Clusters on hosts of this machine: `make test-cluster`, as root. They ask too much of a machine to be in `make test`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Network, unavailable
from tests.cluster.ray_cluster import Cluster

# What `ray[default]` adds and Ray's web page, job server and client port need.
SERVERS = ("aiohttp", "aiohttp_cors", "grpc", "opencensus", "opentelemetry", "prometheus_client")


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    reason = unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Three hosts, not booted yet."""
    with Network(tmp_path_factory.mktemp("hosts"), ("head", "one", "two")) as network:
        yield network


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    """Ray on all three hosts, without a web page."""
    cluster = Cluster(network)
    cluster.start()
    return cluster


@pytest.fixture(scope="module")
def open_cluster(network: Network) -> Cluster:
    """A head whose web page listens to the network, as in a pod, and a host `one` without a node."""
    missing = [name for name in SERVERS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"Ray's servers need ray[default]; missing: {', '.join(missing)}")
    network.boot("one")
    cluster = Cluster(network, dashboard=network.addresses["head"])
    cluster.start("head")
    return cluster


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that every host sees."""
    return tmp_path
