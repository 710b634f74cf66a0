"""Hosts on one machine: each has a network, processes, mounts and a name of its own, and an address on one switch.

    with Network(folder, ("head", "one", "two")) as network:
        host = network.boot("one")
        host.start(["python3", "-c", "..."], stdout=file)
        network.unplug("one")

A host is a set of namespaces that lives by its first process: when that one is killed the kernel kills all others of the host and
takes its network away. First processes end with the process that made them, so that nothing stays behind, not even after a
SIGKILL of the tests, and nothing of the machine's own network is touched: the switch is a namespace as well, without a way out.
Hosts share the file system, as nodes with shared storage do, but for `/tmp/ray` and `/dev/shm`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.processes import descendants, is_alive, kill, title, wait

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
SUBNET = "10.77.0"  # of a network that nothing else can reach
# A host's first process: it mounts what is the host's own, says so, and collects orphans until it is killed.
FIRST = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/$1" /tmp/ray
mount -t tmpfs -o size=1g tmpfs /dev/shm
echo ready
exec > /dev/null
while :; do sleep 3600 & wait; done
"""
WAITS = "sleep 3600"
SWITCH = "echo ready; exec sleep infinity"


def unavailable() -> str:
    """Why there can be no hosts on this machine; empty where there can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"network namespaces need {', '.join(missing)} (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True, text=True)
    return f"this machine gives root no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """A booted host: `first` is its first process as this machine counts them."""

    def __init__(self, name: str, address: str, keeper: subprocess.Popen[str]) -> None:
        self.name, self.address = name, address
        self._keeper = keeper
        self.first = descendants(keeper.pid)[0]

    def start(
        self, command: Sequence[str], *, folder: str | Path, environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """A command of this host, in a folder. The process returned waits for it; `inside` is its own."""
        enter = ["nsenter", "--target", str(self.first), "--net", "--mount", "--pid", "--uts", "--"]
        return subprocess.Popen([*enter, "env", f"--chdir={folder}", *command], env=dict(environment), **options)

    def pids(self) -> list[int]:
        """The host's processes as this machine counts them, without those that only keep it alive."""
        own, keepers = _network_of(self.first), (self._keeper.pid, self.first)
        there = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in keepers]
        return [pid for pid in there if own and _network_of(pid) == own and not title(pid).startswith(WAITS)]

    @property
    def is_up(self) -> bool:
        return is_alive(self.first)

    def off(self) -> None:
        """End the host with all of its processes at once."""
        kill([self.first])
        self._keeper.wait()


def inside(process: subprocess.Popen[bytes]) -> int | None:
    """The process of a host that a started one waits for; None where it has ended."""
    return next(iter(descendants(process.pid)), None)


class Network:
    """A switch and the hosts on it. `folder` takes each host's `/tmp/ray`, which stays there to be read."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, 1)}
        self.hosts: dict[str, Host] = {}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        Path("/tmp/ray").mkdir(exist_ok=True)  # a place to mount on
        self._keeper = _keep("--net", script=SWITCH)
        self._switch = descendants(self._keeper.pid)[0]
        try:
            _in(self._switch, "ip", "link", "add", "bridge", "type", "bridge")
            _in(self._switch, "ip", "link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def boot(self, name: str) -> Host:
        """A host of the names given at the start, new, or again after `cut_power`."""
        (self.folder / name).mkdir(exist_ok=True)
        keeper = _keep("--net", "--mount", "--pid", "--uts", "--mount-proc", script=FIRST, arguments=(name, str(self.folder)))
        host = self.hosts[name] = Host(name, self.addresses[name], keeper)
        _in(self._switch, "ip", "link", "add", _port(name), "type", "veth", "peer", "name", "eth0", "netns", str(host.first))
        _in(self._switch, "ip", "link", "set", _port(name), "master", "bridge", "up")
        _in(host.first, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _in(host.first, "ip", "link", "set", link, "up")
        # Programs ask which of their addresses the world would see. Nothing goes out by it: the switch leads nowhere.
        _in(host.first, "ip", "route", "add", "default", "dev", "eth0")
        return host

    def unplug(self, name: str) -> None:
        """Take the host's cable out of the switch: nobody is told, connections stay open and silent."""
        _in(self._switch, "ip", "link", "set", _port(name), "down")

    def plug(self, name: str) -> None:
        _in(self._switch, "ip", "link", "set", _port(name), "up")

    def slow(self, name: str, rate: str) -> None:
        """Let the host send and receive so much, `1mbit`."""
        for place, link in ((self._switch, _port(name)), (self.hosts[name].first, "eth0")):
            _in(place, "tc", "qdisc", "replace", "dev", link, "root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")

    def fast(self, name: str) -> None:
        for place, link in ((self._switch, _port(name)), (self.hosts[name].first, "eth0")):
            with suppress(subprocess.CalledProcessError):  # it was not slow
                _in(place, "tc", "qdisc", "delete", "dev", link, "root")

    def cut_power(self, name: str) -> None:
        """End a host as a power cut does: its connections are silent, since nobody is left to close them."""
        _in(self._switch, "ip", "link", "delete", _port(name))
        self.hosts.pop(name).off()

    def close(self) -> None:
        """End all hosts and the switch."""
        for host in self.hosts.values():
            host.off()
        self.hosts.clear()
        kill(descendants(self._keeper.pid))
        self._keeper.wait()


def _port(name: str) -> str:
    return f"to-{name}"


def _keep(*namespaces: str, script: str, arguments: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A process that keeps new namespaces as long as its child lives, and both at most as long as this process."""
    tied = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--fork", "--kill-child"]
    command = [*tied, "--", "sh", "-c", script, "first", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise OSError(f"no namespaces: {process.communicate()[1].strip()}")
    wait(lambda: bool(descendants(process.pid)), 5)
    return process


def _in(pid: int, *command: str) -> None:
    """Run a command in a process's network, with this machine's files and processes."""
    subprocess.run(["nsenter", "--target", str(pid), "--net", "--", *command], check=True, capture_output=True, text=True)


def _network_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None
