"""A real Ray cluster on hosts of this machine: a head, raylets, a token, ports that are known, and commands of `lvm-ray` on it.

Every host has two logical CPUs: three have the six of which four are left, what two training workers and a stream need, when one
is lost. The head keeps its tables in RocksDB, so that another head on the same folder goes on with them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lvm_ray import ray_session
from tests.cluster.hosts import Network, inside
from tests.faults.processes import kill, title, wait

ROOT = Path(__file__).resolve().parents[2]
CPUS = 2  # of a host
STORE = 200 * 10**6  # bytes of its objects
PORTS = {
    "port": 6379,
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "ray-client-server-port": 10001,
    "dashboard-port": 8265,
    "dashboard-agent-listen-port": 52365,
    "dashboard-agent-grpc-port": 52366,
    "runtime-env-agent-port": 52367,
    "metrics-export-port": 8080,
    "min-worker-port": 10002,
    "max-worker-port": 19999,
}
OF_HEADS = ("port", "dashboard-port")
BY_ITSELF = "ray-client-server-port"  # listens where gRPC is installed, and cannot be asked for elsewhere
TABLES = "tables"  # the head's, below the network's folder
STARTED = "Ray runtime started."
PATIENCE = 120.0  # seconds until a node is up; a quarter of a minute where nothing else computes
SETTLED = 30.0  # seconds until a node that was without a network knows whether it counts as dead, and has ended itself if so
NODES = """
import json, os
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
nodes = GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info(timeout=20).values()
print(json.dumps([node.node_name for node in nodes if node.state == GcsNodeInfo.ALIVE]))
"""


class Cluster:
    """Ray on the hosts of a network. The first name is the head's."""

    def __init__(self, network: Network, dashboard: str | None = None) -> None:
        """`dashboard`: the address that Ray's web page and job server listen at; "": where Ray puts them, if they are
        installed; None: there are none."""
        self.network, self.dashboard = network, dashboard
        self.folder = network.folder
        self.head, *self.others = network.addresses
        self.address = f"{network.addresses[self.head]}:{PORTS['port']}"
        self.token = self.folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        shutil.rmtree(self.folder / TABLES, ignore_errors=True)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._settled = 0.0  # when all nodes know whether they count as dead, in seconds of the monotonic clock

    def start(self, *names: str) -> None:
        """Have the named hosts' nodes running, by default all: hosts that are off are booted. The head comes first."""
        wanted = [name for name in (self.head, *self.others) if name in (names or (self.head, *self.others))]
        for name in wanted:
            if name not in self.network.hosts:
                self._nodes.pop(name, None)
                self.network.boot(name)
        if self.head in wanted:
            self._start(self.head)
            self._wait_for(self.head)
        for name in wanted:
            if name != self.head:
                self._start(name)
        for name in wanted:
            self._wait_for(name)

    def cut(self, name: str, seconds: float) -> None:
        """Have a host without a network for so long."""
        self.network.unplug(name)
        time.sleep(seconds)
        self.network.plug(name)
        self._settled = time.monotonic() + SETTLED

    def mend(self) -> None:
        """After a fault: every cable in its place, every host and node up, and no node that is only thought to be."""
        time.sleep(max(0.0, self._settled - time.monotonic()))
        for name, host in list(self.network.hosts.items()):
            self.network.plug(name)
            self.network.fast(name)
            process = self._nodes.get(name)
            if process is None or process.poll() is not None:
                kill(host.pids())
                self._nodes.pop(name, None)
        self.start()
        everyone = sorted(self.network.addresses)
        if not wait(lambda: self.alive() == everyone, PATIENCE, 2.0):
            raise TimeoutError(f"the cluster has the nodes {self.alive()}, wanted {everyone}: {self.folder}")

    def alive(self) -> list[str]:
        """Names of the nodes that the head thinks are alive; none where it does not answer."""
        try:
            asked = self.on(self.head, [sys.executable, "-c", NODES], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            return sorted(json.loads(asked.communicate(timeout=60)[0].splitlines()[-1]))
        except (subprocess.TimeoutExpired, ValueError, IndexError, KeyError):
            return []

    def on(self, name: str, command: Sequence[str], token: bool = True, **options: object) -> subprocess.Popen[bytes]:
        """A command on a host, joined to the cluster (`RAY_ADDRESS`); `token`: whether it has the cluster's."""
        environment = {**self.environment(token), "RAY_ADDRESS": self.address}
        return self.network.hosts[name].start(command, folder=ROOT, environment=environment, **options)

    def environment(self, token: bool = True) -> dict[str, str]:
        """Of a process of the cluster: quiet, frugal, with this checkout's modules."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LVM_RAY_HOME": str(self.folder / "home")}
        entry = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token if token else self.folder / "no token")}
        return kept | ray_session._QUIET | ray_session._FRUGAL | own | entry

    def workers(self, part: str, names: Sequence[str] = ()) -> dict[str, list[int]]:
        """Processes whose titles hold a text, by host."""
        hosts = [host for name, host in self.network.hosts.items() if not names or name in names]
        found = {host.name: [pid for pid in host.pids() if part in title(pid)] for host in hosts}
        return {name: pids for name, pids in found.items() if pids}

    def _start(self, name: str) -> None:
        """`ray start` on a host where no node runs."""
        process = self._nodes.get(name)
        if process is not None and process.poll() is None:
            return
        environment = self.environment()
        if name == self.head:
            environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / TABLES)}
        with self._log(name).open("wb") as out:
            self._nodes[name] = self.network.hosts[name].start(
                self._command(name), folder=ROOT, environment=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def _command(self, name: str) -> list[str]:
        is_head = name == self.head
        own = {"node-ip-address": self.network.addresses[name], "node-name": name, "num-cpus": CPUS, "object-store-memory": STORE}
        ports = {flag: port for flag, port in PORTS.items() if flag != BY_ITSELF and (is_head or flag not in OF_HEADS)}
        if is_head:
            if self.dashboard:
                own["dashboard-host"] = self.dashboard
            if self.dashboard != "":
                own["include-dashboard"] = str(self.dashboard is not None)
        else:
            own |= {"address": self.address}
        flags = [f"--{flag}={value}" for flag, value in (own | ports | {"include-log-monitor": "False"}).items()]
        role = ["--head", *([] if self.dashboard is not None else ["--no-monitor"])] if is_head else []
        return [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", "--disable-usage-stats", *flags]

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def _wait_for(self, name: str) -> None:
        process, log = self._nodes[name], self._log(name)
        wait(lambda: STARTED in log.read_text(errors="replace") or process.poll() is not None, PATIENCE, 0.1)
        if STARTED not in log.read_text(errors="replace") or process.poll() is not None:
            raise TimeoutError(f"the node of host {name} has not started: {log.read_text(errors='replace')[-2000:]}")


class Driver:
    """A command of `lvm-ray` on a host of a cluster, or on this machine alone; its output goes into a file."""

    def __init__(self, folder: Path, verb: str, arguments: Sequence[str], start: Callable[..., subprocess.Popen[bytes]]) -> None:
        self.verb = verb
        self._out = folder / f"output-{time.monotonic_ns()}.txt"
        with self._out.open("wb") as out:
            self.process = start([sys.executable, "-m", "lvm_ray", verb, *arguments], stdout=out, stderr=subprocess.STDOUT)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL of the command itself, which on a host is not the process that was started."""
        entered = title(self.process.pid).startswith("nsenter")
        kill([pid for pid in [inside(self.process) if entered else self.process.pid] if pid is not None])

    def finish(self, seconds: float) -> int | None:
        """Its exit code, or None where it hangs: then it is killed."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        self.kill()
        self.process.wait()
        return None

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")


def on_host(cluster: Cluster, name: str) -> Callable[..., subprocess.Popen[bytes]]:
    """What starts a `Driver` on a host of a cluster."""
    return lambda command, **options: cluster.on(name, command, **options)


def here(command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    """What starts a `Driver` on this machine alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)  # type: ignore[call-overload]
