"""A Ray cluster on this machine, for tests that need nodes to choose from: a head without CPUs, and nodes beside it.

    with on_nodes([{"labels": {"pool": "cpu"}, "num_cpus": 2}]) as cluster:
        cluster.run(function, argument)

The cluster lives in a process of its own, and so does the driver that has joined it: the tests' own Ray is left alone. As a
module (`python -m tests.nodes NODE ...`) this is the cluster: nodes are JSON, a further line on its standard input is a further
node, and its end is the cluster's.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}
STORE = 2**27  # bytes of a node's object store


class Nodes(NamedTuple):
    """A cluster, and a driver on it."""

    address: str
    orders: IO[str]
    driver: ProcessPoolExecutor

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives in the driver's process. Raises what it raises."""
        return self.driver.submit(work, *arguments).result(timeout=300)

    def add(self, node: dict[str, Any]) -> None:
        """Start one more node; whoever needs it waits for it."""
        self.orders.write(json.dumps(node) + "\n")
        self.orders.flush()


@contextmanager
def on_nodes(nodes: Sequence[dict[str, Any]], **environment: str) -> Iterator[Nodes]:
    """A cluster of these nodes while the body runs. `environment` is the cluster's own."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "tests.nodes", *map(json.dumps, nodes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=ours | QUIET | environment, cwd=ROOT, **pipes) as cluster:  # type: ignore[call-overload]
        address = cluster.stdout.readline().strip()
        assert address, "the cluster has not started"
        try:
            with ProcessPoolExecutor(1, get_context("spawn"), _join, (address,)) as driver:
                yield Nodes(address, cluster.stdin, driver)
        finally:
            cluster.stdin.close()


def _join(address: str) -> None:
    """A driver says nothing on the tests' terminal, and knows nothing of a Ray that the tests have started before."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(QUIET, RAY_ADDRESS=address)
    sys.stdout = io.StringIO()


def main() -> None:
    """The cluster."""
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    if "METRICS_PORT" in os.environ:
        head["metrics_export_port"] = int(os.environ["METRICS_PORT"])
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for node in sys.argv[1:]:
        cluster.add_node(object_store_memory=STORE, **json.loads(node))
    print(cluster.address, flush=True)
    for node in sys.stdin:
        cluster.add_node(object_store_memory=STORE, **json.loads(node))
    cluster.shutdown()


if __name__ == "__main__":
    main()
