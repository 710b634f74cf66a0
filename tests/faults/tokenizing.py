"""Tokenizing that is killed: the driver, then a tokenizing worker, at random moments, five times in one data set.

The finished data set must hold each pair once, with the tokens of an undisturbed run; and so with one worker and with two.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lvm_ray.data.shards import open_shards
from tests.faults.processes import descendants, is_alive, kill, named, wait

KILLS = 5
WORKER = "UnitTokenizer"  # stands in the name of Ray's process of an actor
SEED = 20261124


def cases() -> Iterator[dict[str, Any]]:
    """The undisturbed run, the killed one, and both numbers of workers."""
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        recipe = _recipe(place)
        _finish(_start("synth", recipe, place / "made"))
        wanted = {}
        for workers in (1, 2):
            run = _copy(place / "made", place / f"workers-{workers}")
            code = _finish(_start("tokenize", recipe, run, workers))
            wanted[workers] = _content(run)
            yield {"case": f"tokenize, {workers} workers", "outcome": f"exit {code}, {wanted[workers][:16]}", "ok": code == 0}
        same = wanted[1] == wanted[2]
        yield {"case": "tokenize: 1 and 2 workers give the same content", "outcome": "same" if same else "other", "ok": same}
        run = _copy(place / "made", place / "killed")
        shutil.copytree(place / "workers-2" / "tokenizer", run / "tokenizer")
        dice = random.Random(SEED)
        for number in range(KILLS):
            yield _kill_driver(recipe, run, number, dice) if number % 2 == 0 else _kill_worker(recipe, run, number, dice)
        code = _finish(_start("tokenize", recipe, run, 2))
        found = _content(run)
        yield {
            "case": f"tokenize after {KILLS} kills: the content of an undisturbed run",
            "outcome": f"exit {code}, {'same' if found == wanted[1] else 'other'} content, {_duplicates(run)} pairs twice",
            "ok": code == 0 and found == wanted[1] and _duplicates(run) == 0,
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _recipe(place: Path) -> Path:
    """The demo's data with other sizes, so that tokenizing takes about a minute."""
    values = yaml.safe_load(Path("recipes/demo.yaml").read_text())
    values["synth"]["train"] = {"segmentation": 4000, "pose": 400, "derain": 120}
    values["tasks"]["pose"]["copies"], values["tasks"]["derain"]["copies"] = 20, 60
    values["tokenizer"]["steps"] = 20
    values["compute"]["threads"] = 1
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _copy(made: Path, run: Path) -> Path:
    """A run folder of its own on the same images (the recipe names them below the run)."""
    (run / "data").mkdir(parents=True)
    shutil.copytree(made / "data" / "source", run / "data" / "source", copy_function=os.link)
    return run


def _start(verb: str, recipe: Path, run: Path, workers: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lvm_ray", verb, str(recipe), "--run", str(run), "--set", f"compute.workers={workers}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def _finish(process: subprocess.Popen[bytes]) -> int:
    _, errors = process.communicate(timeout=900)
    if process.returncode:
        print(errors.decode()[-2000:], file=sys.stderr)
    return process.returncode


def _kill_driver(recipe: Path, run: Path, number: int, dice: random.Random) -> dict[str, Any]:
    """Start, wait until some units are done and a random moment more, and SIGKILL the driver."""
    process = _start("tokenize", recipe, run, 2)
    before = _records(run)
    wait(lambda: _records(run) > before or process.poll() is not None, 120)
    time.sleep(dice.uniform(0, 3))
    family = descendants(process.pid)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    gone = wait(lambda: not any(is_alive(pid) for pid in family), 90)  # Ray's agents look for their parent once a minute
    kill(family)  # ours: descendants of the driver that Ray did not end by itself
    done, finished = _records(run), (run / "data/shards/manifest.json").is_file()
    return {
        "case": f"kill {number + 1}: SIGKILL of the driver",
        "outcome": f"{'killed' if alive else 'had ended'}, {done} units done, Ray's processes {'ended' if gone else 'stayed'}",
        "ok": alive and not finished,
    }


def _kill_worker(recipe: Path, run: Path, number: int, dice: random.Random) -> dict[str, Any]:
    """Start, SIGKILL a tokenizing worker at a random moment, see the run go on without a restart, then end the driver."""
    process = _start("tokenize", recipe, run, 2)
    wait(lambda: bool(named(process.pid, WORKER)) or process.poll() is not None, 120)
    before = _records(run)
    wait(lambda: _records(run) > before or process.poll() is not None, 60)
    time.sleep(dice.uniform(0, 1.5))
    victims = named(process.pid, WORKER)
    kill(victims[:1])
    then = _records(run)
    went_on = wait(lambda: _records(run) > then + 1 or process.poll() is not None, 90)
    alive = process.poll() is None
    family = descendants(process.pid)
    process.kill()
    process.communicate()
    wait(lambda: not any(is_alive(pid) for pid in family), 30)
    return {
        "case": f"kill {number + 1}: SIGKILL of a tokenizing worker",
        "outcome": f"{len(victims)} workers, one killed; the run {'went on' if went_on else 'stood still'}",
        "ok": bool(victims) and went_on and alive,
    }


def _records(run: Path) -> int:
    return len(list((run / "data" / "shards" / ".units").glob("*.json")))


def _content(run: Path) -> str:
    """A checksum of the data set's logical content: split, task, copy, ids and tokens."""
    shards = open_shards(str(run / "data" / "shards"))
    digest = hashlib.sha256()
    for split, tasks in sorted(shards.manifest.rows.items()):
        for task, copies in sorted(tasks.items()):
            for copy in sorted(copies):
                ids, tokens = shards.pairs(split, task, copy)
                for place in sorted(range(len(ids)), key=ids.__getitem__):
                    digest.update(f"{split} {task} {copy} {ids[place]}".encode() + tokens[place].tobytes())
    return digest.hexdigest()


def _duplicates(run: Path) -> int:
    shards = open_shards(str(run / "data" / "shards"))
    twice = 0
    for split, tasks in shards.manifest.rows.items():
        for task, copies in tasks.items():
            for copy in copies:
                ids, _ = shards.pairs(split, task, copy)
                twice += len(ids) - len(set(ids))
    return twice
