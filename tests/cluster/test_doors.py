"""Who has no token gets nowhere, tried over the network from another host; and nothing listens that the docs do not list."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Network
from tests.cluster.ports import PAGE, SCAN, listed
from tests.cluster.ray_cluster import PORTS, Cluster
from tests.faults.processes import wait

PATIENCE = 120.0
TABLES = """
import sys
from ray._raylet import GcsClient
print("let in", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
"""
CLIENT = """
import sys, ray
ray.init(f"ray://{sys.argv[1]}", logging_level="error")
print("let in", ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()), flush=True)
sys.stdin.read()
"""
# What a client asks first, without its library, which asks for half a minute and does not say why it gave up.
ASK = """
import grpc, os, sys
channel = grpc.insecure_channel(sys.argv[1])
sent = [("authorization", "Bearer " + os.environ["RAY_AUTH_TOKEN"])] if "RAY_AUTH_TOKEN" in os.environ else []
try:
    channel.unary_unary("/ray.rpc.RayletDriver/Schedule")(b"", timeout=30, metadata=sent)
    print("let in")
except grpc.RpcError as error:
    sys.exit(f"{error.code()}: {error.details()}")
"""
# Method, URL and body: the status of the answer. Whose token is sent is the environment's.
HTTP = """
import os, sys, urllib.error, urllib.request
method, url, body = sys.argv[1:4]
request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"}, method=method)
path, token = os.environ.get("RAY_AUTH_TOKEN_PATH", ""), os.environ.get("RAY_AUTH_TOKEN", "")
if os.path.isfile(path) or token:
    request.add_header("Authorization", "Bearer " + (token or open(path).read()))
try:
    print("status", urllib.request.urlopen(request, timeout=30).status)
except urllib.error.HTTPError as error:
    print("status", error.code)
except urllib.error.URLError as error:
    print("refused", error.reason)
"""
WORK = """
import ray
ray.init(logging_level="error")
@ray.remote
class Worker:
    def up(self): return True
workers = [Worker.remote() for _ in range(2)]
print(ray.get([one.up.remote() for one in workers]), flush=True)
import sys; sys.stdin.read()
"""
PATHS = ("/api/jobs/", "/api/v0/actors", "/api/v0/nodes", "/nodes?view=summary", "/api/v0/logs")
WITHOUT = {"RAY_AUTH_MODE": "disabled"}  # it sends nothing
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


def outside(cluster: Cluster, code: str, *arguments: str, token: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, output) of Python on host `one`, where no node runs; `token`: instead of the cluster's."""
    environment = cluster.environment(token is None) | (token or {})
    if token is not None and "RAY_AUTH_TOKEN_PATH" not in token:
        del environment["RAY_AUTH_TOKEN_PATH"]
    environment["HOME"] = str(cluster.folder)  # no token of this machine's user
    process = cluster.network.hosts["one"].start(
        [sys.executable, "-c", code, *arguments],
        folder="/",
        environment=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode(errors="replace")


def refused(cluster: Cluster, code: str, *arguments: str, token: dict[str, str]) -> bool:
    """Whether the code does not get in and says that it is for the token."""
    status, said = outside(cluster, code, *arguments, token=token)
    assert "let in" not in said, said
    return status != 0 and "uthent" in said


@pytest.mark.parametrize("token", [WITHOUT, WRONG], ids=["no token", "another token"])
def test_the_tables_of_the_head_are_closed(open_cluster: Cluster, token: dict[str, str]) -> None:
    assert refused(open_cluster, TABLES, open_cluster.address, token=token)


def test_the_tables_of_the_head_are_open_with_the_token(open_cluster: Cluster) -> None:
    assert outside(open_cluster, TABLES, open_cluster.address) == (0, "let in 1\n")


@pytest.mark.parametrize("token", [WITHOUT, WRONG], ids=["no token", "another token"])
def test_the_client_port_is_closed(open_cluster: Cluster, token: dict[str, str]) -> None:
    assert refused(open_cluster, ASK, f"head:{PORTS['ray-client-server-port']}", token=token)


def test_the_client_port_is_open_with_the_token(open_cluster: Cluster) -> None:
    status, said = outside(open_cluster, CLIENT, f"head:{PORTS['ray-client-server-port']}")
    assert status == 0 and said.endswith("let in 42\n"), said


@pytest.mark.parametrize(("token", "wanted"), [(WITHOUT, "401"), (WRONG, "403")], ids=["no token", "another token"])
def test_jobs_and_the_web_pages_interfaces_are_closed(open_cluster: Cluster, token: dict[str, str], wanted: str) -> None:
    mark = open_cluster.folder / "mark"
    page, agent = (f"http://head:{PORTS[flag]}" for flag in ("dashboard-port", "dashboard-agent-listen-port"))
    job = f'{{"entrypoint": "touch {mark}"}}'
    asked = [
        ("POST", f"{page}/api/jobs/", job),
        ("POST", f"{agent}/api/job_agent/jobs/", job),
        *(("GET", f"{page}{path}", "") for path in PATHS),
    ]
    statuses = {where: outside(open_cluster, HTTP, method, where, body, token=token)[1] for method, where, body in asked}
    assert set(statuses.values()) == {f"status {wanted}\n"}, statuses
    time.sleep(3)
    assert not mark.exists()


def test_jobs_are_taken_with_the_token(open_cluster: Cluster) -> None:
    mark = open_cluster.folder / "taken"
    url = f"http://head:{PORTS['dashboard-port']}/api/jobs/"
    assert outside(open_cluster, HTTP, "POST", url, f'{{"entrypoint": "touch {mark}"}}')[1] == "status 200\n"
    assert wait(mark.exists, PATIENCE, 0.5)


def scanned(cluster: Cluster) -> set[int]:
    """Ports of the head that accept connections from host `one`, while processes of a job run on it."""
    status, said = outside(cluster, SCAN, cluster.network.addresses["head"], "1000")
    assert status == 0, said
    return {int(port) for port in said.split()}


def working(cluster: Cluster) -> subprocess.Popen[bytes]:
    """A job on the head with two processes; it goes on until its input is closed."""
    job = cluster.on("head", [sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline() == b"[True, True]\n"
    return job


def check_ports(cluster: Cluster) -> None:
    job = working(cluster)
    try:
        found = scanned(cluster)
    finally:
        assert job.stdin is not None
        job.stdin.close()
        job.wait(PATIENCE)
    workers = [port for port in found if PORTS["min-worker-port"] <= port <= PORTS["max-worker-port"]]
    assert PORTS["port"] in found and len(workers) >= 3, f"the scan saw too little: {sorted(found)}"
    assert found <= listed(), f"open and not listed in {PAGE.name}: {sorted(found - listed())}"


def test_nothing_listens_that_the_docs_do_not_list_where_the_web_page_is_open(open_cluster: Cluster) -> None:
    check_ports(open_cluster)


def test_nothing_listens_that_the_docs_do_not_list(network: Network, tmp_path: Path) -> None:
    """The cluster as it is by default: the web page, where there is one, on the head's loopback alone."""
    if "head" in network.hosts:
        network.cut_power("head")
    if "one" not in network.hosts:
        network.boot("one")
    cluster = Cluster(network, dashboard="")
    cluster.start("head")
    check_ports(cluster)
    assert PORTS["dashboard-port"] not in scanned(cluster)
