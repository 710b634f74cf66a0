"""Hosts are apart from each other and from this machine, can be cut off, slowed and lost, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Network
from tests.faults.processes import is_alive, kill, wait

PORT = 7001
SERVE = f"""
import socket
server = socket.create_server(("", {PORT}))
print("up", flush=True)
while True:
    one, _ = server.accept()
    while one.recv(1 << 16):
        pass
    one.close()
"""
ASK = f"import socket, sys; socket.create_connection((sys.argv[1], {PORT}), 2).close()"
SEND = f"""
import socket, sys
one = socket.create_connection((sys.argv[1], {PORT}), 20)
one.sendall(bytes(1 << 18))
one.shutdown(socket.SHUT_WR)
one.recv(1)
"""


def run(network: Network, name: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    process = network.hosts[name].start(
        command, folder="/", environment=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out)


def reaches(network: Network, name: str, address: str) -> bool:
    return run(network, name, "python3", "-c", ASK, address).returncode == 0


@pytest.fixture
def served(network: Network) -> Iterator[str]:
    """A server on host `two`: its address."""
    for name in ("one", "two"):
        if name not in network.hosts:
            network.boot(name)
    server = network.hosts["two"].start(["python3", "-c", SERVE], folder="/", environment=os.environ, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"up\n"
    yield network.addresses["two"]
    kill(network.hosts["two"].pids())


def test_a_host_has_a_name_an_address_and_processes_of_its_own(network: Network, served: str) -> None:
    assert reaches(network, "one", served) and reaches(network, "one", "two")
    assert run(network, "one", "uname", "-n").stdout.decode().strip() == "one"
    seen = run(network, "two", "sh", "-c", "ls -d /proc/[0-9]*").stdout.decode().split()
    assert 2 <= len(seen) < 8 < len([name for name in os.listdir("/proc") if name.isdigit()])
    assert not [name for _, name in socket.if_nameindex() if name.startswith("to-") or name == "bridge"]
    run(network, "one", "touch", "/tmp/ray/mine", "/dev/shm/mine")
    assert (network.folder / "one" / "mine").exists() and not Path("/dev/shm/mine").exists()
    assert run(network, "two", "ls", "/tmp/ray/mine").returncode


def test_a_cable_can_be_pulled_and_slowed(network: Network, served: str) -> None:
    def seconds() -> float:
        began = time.monotonic()
        assert run(network, "one", "python3", "-c", SEND, served).returncode == 0
        return time.monotonic() - began

    usual = seconds()
    network.slow("two", "1mbit")
    assert seconds() > usual + 1.0, "256 KiB take two seconds at 1 Mbit/s"
    network.fast("two")
    assert seconds() < usual + 1.0
    network.unplug("two")
    assert not reaches(network, "one", served)
    network.plug("two")
    assert wait(lambda: reaches(network, "one", served), 20, 0.5)


def test_a_host_that_loses_its_power_is_gone_with_all_it_ran_and_comes_back_empty(network: Network, served: str) -> None:
    host = network.hosts["two"]
    before = host.pids()
    assert before
    network.cut_power("two")
    assert wait(lambda: not any(is_alive(pid) for pid in before), 5) and not host.is_up and host.pids() == []
    network.boot("two")
    assert network.hosts["two"].pids() == [] and not reaches(network, "one", served)
    assert reaches(network, "one", network.addresses["one"]) is False, "nothing listens there"


def test_nothing_is_left_of_hosts_whose_maker_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.cluster.hosts import Network\n"
        "n = Network(Path(sys.argv[1]), ('head',)); h = n.boot('head'); print(h.first, n._switch, flush=True); time.sleep(60)"
    )
    maker = subprocess.Popen(["python3", "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."})
    assert maker.stdout is not None
    firsts = [int(pid) for pid in maker.stdout.readline().split()]
    assert len(firsts) == 2 and all(is_alive(pid) for pid in firsts)
    maker.kill()
    maker.wait()
    assert wait(lambda: not any(is_alive(pid) for pid in firsts), 5)
