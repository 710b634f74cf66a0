"""Faults of a cluster: every verb beside every way in which a cluster breaks, on hosts of this machine.

    make faults-cluster [ONLY="train/cut tune"]     as root: some cells, or all cells of a verb or of a fault

Writes `runs/faults-cluster.json`, `[{"case", "outcome", "ok"}]`, and the table of `docs/reliability.md`, after every cell; cells
that are not run keep theirs. A cell starts the command, waits until it is in the middle of its work, breaks something, and bounds
every wait. It is good where the command comes to the undisturbed result by itself, and where it ends with one clear line (or was
killed) and the same command again comes to it. A command that has to be ended hangs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Network, unavailable
from tests.cluster.pipeline import STAGES, Stage, arguments, make_images, prepare, write_recipe
from tests.cluster.ray_cluster import Cluster, Driver, on_host
from tests.faults import page
from tests.faults.processes import kill, title, wait
from tests.faults.runs import Case, case, last_line, refusal

OUT = Path("runs/faults-cluster.json")
MARK = "cluster faults"
HOSTS = ("head", "one", "two")
START = 240.0  # seconds until a command is in the middle of its work; half a minute where nothing else computes
END = 420.0  # seconds from a fault to the command's end: a lost node is known after a minute, and workers start anew
CUT = 30.0  # seconds without a network
RATE = "1mbit"


class Missed(Exception):
    """The fault could not be had: the message says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="VERB/FAULT", help=f"verbs: {', '.join(STAGES)}; faults: {', '.join(FAULTS)}")
    parser.add_argument("--keep", action="store_true", help="keep the folder with Ray's logs and the runs")
    options = parser.parse_args()
    cells = chosen(options.only)
    if not cells:
        parser.error(f"no such cells: {' '.join(options.only)}")
    reason = unavailable()
    if reason:
        print(f"skipped: {reason}")
        return 0
    known: dict[str, Case] = {one["case"]: one for one in json.loads(OUT.read_text())} if OUT.is_file() else {}
    with base(options.keep) as place:
        for verb, fault in cells:
            began = time.monotonic()
            found = cell(place, verb, fault)
            known[found["case"]] = found
            said = f"{'ok  ' if found['ok'] else 'FAIL'} {found['case']}: {found['outcome']}"
            print(f"{said} ({time.monotonic() - began:.0f} s)", flush=True)
            everything = [name(*one) for one in chosen([])]
            page.write(sorted(known.values(), key=lambda one: everything.index(one["case"])), OUT, MARK)
    return 0 if all(known[name(*one)]["ok"] for one in cells) else 1


def chosen(only: Sequence[str]) -> list[tuple[str, str]]:
    """The cells that are asked for, fault by fault: all of them, or those of a verb, of a fault, or `VERB/FAULT`."""
    every = [(verb, fault) for fault in FAULTS for verb in STAGES]
    return [(verb, fault) for verb, fault in every if not only or {verb, fault, f"{verb}/{fault}"} & set(only)]


def name(verb: str, fault: str) -> str:
    return f"{verb}: {FAULTS[fault].what}"


@dataclass
class Base:
    """A cluster, a finished pipeline on its shared storage, and what undisturbed commands came to."""

    place: Path
    cluster: Cluster
    recipe: Path
    undisturbed: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    @property
    def pipeline(self) -> Path:
        """The pipeline's finished folder."""
        return self.place / "pipeline"

    def start(self, verb: str, run: Path, host: str) -> Driver:
        told = arguments(self.recipe, verb, run, *STAGES[verb].settings)
        return Driver(self.place, verb, told, on_host(self.cluster, host))

    def fresh(self, verb: str) -> Path:
        """A new run's folder for a verb."""
        self.number += 1
        run = self.place / f"{verb}-{self.number}"
        prepare(self.pipeline, run, STAGES[verb])
        return run

    def reference(self, verb: str) -> Any:
        """What the undisturbed command comes to on this cluster."""
        if verb not in self.undisturbed:
            run = self.fresh(verb)
            driver = self.start(verb, run, self.cluster.head)
            code = driver.finish(END)
            if code != 0:
                raise RuntimeError(f"the undisturbed {verb} ended with {code}: {driver.output[-3000:]}")
            self.undisturbed[verb] = STAGES[verb].result(run)
        return self.undisturbed[verb]


@contextmanager
def base(keep: bool = False) -> Iterator[Base]:
    place = Path(tempfile.mkdtemp(prefix="hosts-"))
    try:
        make_images(place)
        recipe = write_recipe(place)
        with Network(place, HOSTS) as network:
            cluster = Cluster(network)
            cluster.start()
            found = Base(place, cluster, recipe)
            for verb in ("tokenize", "train"):
                driver = found.start(verb, found.pipeline, cluster.head)
                if driver.finish(END) != 0:
                    raise RuntimeError(f"{verb} of the pipeline: {driver.output[-3000:]}")
            yield found
    finally:
        if keep:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)


def cell(base: Base, verb: str, fault: str) -> Case:
    """Run one cell. The cluster is whole before it."""
    stage, kind, label = STAGES[verb], FAULTS[fault], name(verb, fault)
    try:
        base.cluster.mend()
        wanted = base.reference(verb)
    except (OSError, RuntimeError) as error:
        return case(label, f"not run: {_short(str(error), base)}", False)
    run = base.fresh(verb)
    driver = base.start(verb, run, kind.driver)
    if not wait(lambda: driver.ended or stage.progress(run) >= stage.begun, START, 0.01) or driver.ended:
        driver.finish(0)
        return case(label, f"never came to the middle of its work: {_short(last_line(driver.output), base)}", False)
    at = stage.progress(run)
    try:
        told = kind.strike(base, stage, driver)
    except Missed as error:
        driver.finish(0)
        return case(label, f"missed: {error}", False)
    began = time.monotonic()
    code = driver.finish(END)
    seconds = time.monotonic() - began
    outcome, ok = f"{told} at {at}", code is not None
    if code is None:
        outcome += f"; hangs: ended after {seconds:.0f} s"
    elif code == 0:
        outcome += f"; went on and ended {seconds:.0f} s later"
    elif fault == "driver":
        outcome += f"; ended with {code}"
    else:
        said = refusal(driver.output, verb)
        ok = code == 2 and bool(said)
        outcome += f"; ended with {code} after {seconds:.0f} s: {_short(said or last_line(driver.output), base)}"
    if code != 0:
        again, words = _again(base, verb, run)
        outcome, ok = f"{outcome}; the same command {words}", ok and again
        if not again:
            return case(label, outcome, False)
    same = stage.result(run) == wanted
    return case(label, f"{outcome}; {'the undisturbed result' if same else 'ANOTHER result'}", ok and same)


def _again(base: Base, verb: str, run: Path) -> tuple[bool, str]:
    """The same command once more on a whole cluster: whether it ended well, and that in words."""
    try:
        base.cluster.mend()
    except OSError as error:
        return False, f"was not run again: {_short(str(error), base)}"
    began = time.monotonic()
    driver = base.start(verb, run, base.cluster.head)
    code = driver.finish(END)
    seconds = f"{time.monotonic() - began:.0f} s"
    if code == 0:
        return True, f"again ended well after {seconds}"
    how = "hangs" if code is None else f"ended with {code}"
    return False, f"again {how} after {seconds}: {_short(last_line(driver.output), base)}"


def _short(text: str, base: Base) -> str:
    """A line for a table: without this machine's folders, and not too long."""
    text = re.sub(r"\s+", " ", text.replace(f"{base.place}/", ""))
    return text if len(text) <= 240 else text[:237] + "..."


# Faults


@dataclass(frozen=True)
class Fault:
    """strike: breaks something while a command of a stage works: what, in words. driver: the host of the command."""

    what: str
    strike: Callable[[Base, Stage, Driver], str]
    driver: str = "head"


def _victim(base: Base, stage: Stage) -> tuple[str, list[int]]:
    """A host beside the head on which processes work for the stage, and these."""
    cluster = base.cluster
    wait(lambda: cluster.workers(stage.worker, cluster.others), 20)
    found = cluster.workers(stage.worker, cluster.others)
    if not found:
        there = {title(pid).split()[0] for host in cluster.network.hosts.values() for pid in host.pids() if title(pid)}
        raise Missed(f"no process of it ({stage.worker}) beside the head: {', '.join(sorted(there))[:300]}")
    return max(found.items(), key=lambda item: len(item[1]))


def _kill_worker(base: Base, stage: Stage, driver: Driver) -> str:
    host, pids = _victim(base, stage)
    kill(pids[:1])
    return f"one process on {host} killed"


def _lose_node(base: Base, stage: Stage, driver: Driver) -> str:
    host, pids = _victim(base, stage)
    base.cluster.network.cut_power(host)
    return f"{host} lost with {len(pids)} of its processes"


def _cut_network(base: Base, stage: Stage, driver: Driver) -> str:
    host, pids = _victim(base, stage)
    base.cluster.cut(host, CUT)
    return f"{host} with {len(pids)} of its processes without a network for {CUT:.0f} s"


def _slow_link(base: Base, stage: Stage, driver: Driver) -> str:
    host, pids = _victim(base, stage)
    base.cluster.network.slow(host, RATE)
    return f"{host} with {len(pids)} of its processes at 1 Mbit/s"


def _kill_driver(base: Base, stage: Stage, driver: Driver) -> str:
    if driver.ended:
        raise Missed("it had ended")
    driver.kill()
    return "the command killed"


def _restart_head(base: Base, stage: Stage, driver: Driver) -> str:
    cluster = base.cluster
    cluster.network.cut_power(cluster.head)
    began = time.monotonic()
    cluster.start(cluster.head)
    return f"the head lost, another there after {time.monotonic() - began:.0f} s"


FAULTS = {
    "worker": Fault("SIGKILL of a worker process", _kill_worker),
    "node": Fault("a whole node lost", _lose_node),
    "cut": Fault("a node off the network for 30 s", _cut_network),
    "slow": Fault("a node's link at 1 Mbit/s", _slow_link),
    "driver": Fault("SIGKILL of the driver", _kill_driver),
    "head": Fault("the head restarted", _restart_head, driver="one"),
}


if __name__ == "__main__":
    sys.exit(main())
