"""Training that is killed, starved of disk, handed a damaged checkpoint, diverging, preempted.

Every case is a real run of the command line, and every kill a SIGKILL. The measure is an undisturbed run of the same command:
each step once, losses and gradient norms equal in every digit, the model's file equal in every byte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from lvm_ray.storage import is_uri
from tests.faults.processes import is_alive, kill, named, wait
from tests.faults.runs import (
    EVERY,
    SHORT,
    Base,
    Case,
    Command,
    case,
    checkpoints,
    differs,
    journal,
    lines_differ,
    newest,
    reached,
)

ONE = ("compute.workers=0", f"train.steps={SHORT}")
WORKER = "ray::RayTrainWorker"  # stands in the name of Ray's process of a training worker
RAYLET = "/raylet/raylet"
DEATH = 120.0  # seconds within which a command must end, or go on, after its raylet has died
STILL = 3.0  # seconds without a step that only a start of workers takes
START = 300.0  # seconds to the first new step of a command or of restarted workers; half a minute where nothing else computes


# Kills


def kills(base: Base) -> Iterator[Case]:
    """Worker, driver and raylet, each during a step and during a checkpoint's write, all in one run; and the same alone."""
    victims = ("a worker", "the driver", "the raylet")
    yield from _chain(base, "killed", [(victim, phase) for victim in victims for phase in ("a step", "a write")])
    yield from _chain(base, "killed-alone", [("the driver", "a step"), ("the driver", "a write")], *ONE)


def uploads(base: Base) -> Iterator[Case]:
    """Worker, driver and raylet while a checkpoint is uploaded, in one run at a URI; and the machine, with all it held."""
    victims = ("a worker", "the driver", "the machine", "the raylet")
    yield from _chain(base, f"file://{base.place}/target/uploaded", [(victim, "an upload") for victim in victims])


def _chain(base: Base, name: str, events: list[tuple[str, str]], *settings: str) -> Iterator[Case]:
    """One run through all kills to its end: a case each, and one for the finished run."""
    reference = base.reference(*settings)
    target = Path(name.removeprefix("file://")) if is_uri(name) else base.place / name
    alone = ", workers: 0" if settings == ONE else ""
    command: Command | None = None
    for victim, phase in events:
        if command is None or command.ended:
            command = base.start(name, *settings)
        outcome, ok = _kill(command, partial(base.folder, name), target, victim, phase)
        if ok:
            began, old = time.monotonic(), command
            if victim != "a worker":
                code = _code_after(command)
                ok = code is not None
                outcome += f"; the command {f'ended with {code} after {time.monotonic() - began:.0f} s' if ok else 'hung'}"
            lowest = newest(base.folder(name))
            if victim == "the machine":
                old.end()
                shutil.rmtree(base.home)
                lowest = newest(target)
            if command.ended:
                command = base.start(name, *settings)
            went_on, problem = _goes_on(command, partial(base.folder, name), reference, lowest)
            outcome += f"; {went_on} {time.monotonic() - began:.0f} s after the kill"
            outcome += f", but {_short(problem, base)}" if problem else ", losses equal"
            ok = ok and not problem
            if old is not command:
                old.end()
        yield case(f"SIGKILL of {victim} during {phase}{alone}", outcome, ok)
    assert command is not None
    code = command.finish()
    if code != 0:  # killed workers have used up Ray's restarts
        command = base.start(name, *settings)
        code = command.finish()
    problem = differs(target, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
    said = problem or f"{len(journal(target))} steps, each once; losses equal in every digit, the model in every byte"
    yield case(f"the run after these {len(events)} kills{alone}", said, not problem)


def _kill(command: Command, run: Callable[[], Path], target: Path, victim: str, phase: str) -> tuple[str, bool]:
    """Wait until the run is in the phase and kill the victim then. What happened, and whether it did in time."""
    alone = "compute.workers=0" in command.settings

    def started() -> bool:
        return newest(run()) > 0 and (alone or bool(named(command.pid, WORKER)))

    if not wait(lambda: command.ended or started(), START, 0.1) or command.ended:
        return f"no checkpoint to be seen; the last line is: {command.last_line}", False
    command.look()
    workers, folder = named(command.pid, WORKER), run() / "checkpoints"
    pids = {"a worker": workers[:1], "the raylet": named(command.pid, RAYLET)}.get(victim, [command.pid])
    if victim == "the machine":
        pids = [*command.look(), *pids]
    there = target / "checkpoints"
    left = _unfinished(folder) | _uploading(there)  # by an earlier kill
    in_phase: Callable[[], bool] = {
        "a step": lambda: 2 <= reached(run()) % EVERY <= EVERY - 3 and not _unfinished(folder) - left,
        "a write": lambda: bool(_unfinished(folder) - left),
        "an upload": lambda: bool(_uploading(there) - left),
    }[phase]
    if not wait(lambda: command.ended or in_phase(), START, 0.001) or command.ended:
        return f"the run {'ended' if command.ended else 'never came to that'}: {command.last_line}", False
    if phase != "a step" and victim == "a worker":
        pids = _writers(workers, folder) or pids
    kill(pids)
    hit = in_phase()
    where = f"at step {reached(run())}, last checkpoint {newest(run())}"
    if phase == "a step":
        return where, True
    if alone or victim in ("a worker", "the machine"):  # the writer: it must have left its work undone
        wait(lambda: not any(is_alive(pid) for pid in pids), 5, 0.001)
        hit = in_phase()
        where += ", cut off" if hit else ""
    return where if hit else f"{where}: too late, {phase.split()[1]} was over", hit


def _code_after(command: Command) -> int | None:
    """The exit code of a command that lost its driver or its raylet; None where it hangs."""
    wait(lambda: command.ended, DEATH)
    code = command.process.poll()
    if code is None:
        command.end()
    return code


def _goes_on(command: Command, run: Callable[[], Path], reference: Path, lowest: int) -> tuple[str, str]:
    """Wait for the journal to be cut at a checkpoint and to grow over the next one: what was seen, and what is wrong.

    Workers that a kill has left may go on for a while, so the cut is where the journal last fell back, or, where it ended at a
    checkpoint and had not to, where it stood still while the workers started.
    """
    seen: list[tuple[float, int]] = []  # when the journal came to another last step, and to which

    def cut() -> int | None:
        pairs = list(pairwise(seen))
        fallen = [after for (_, before), (_, after) in pairs if after < before]
        stood = [step for (since, step), (until, _) in pairs if until - since > STILL]
        return fallen[-1] if fallen else stood[-1] if stood else None

    def grown() -> bool:
        step = reached(run())
        # A lost machine's journal is not there until it is fetched.
        if step and (not seen or step != seen[-1][1]):
            seen.append((time.monotonic(), step))
        start = cut()
        return command.ended or (start is not None and step >= start + EVERY)

    if not wait(grown, START, 0.02):
        return f"stood still at step {reached(run())}", "nothing more came"
    found = journal(run())
    problem = lines_differ(found, journal(reference)[: len(found)])
    if command.ended and not problem and len(found) == len(journal(reference)):
        return "was found trained to the end by the workers that were left", ""
    start = cut()
    if command.ended or start is None:
        problem = f"it ended with {command.process.poll()}: {command.last_line}"
    elif start < lowest:
        problem = problem or f"there was a checkpoint of step {lowest}"
    elif start % EVERY:
        problem = problem or "that is no checkpoint's"
    return f"went on from step {start}", problem


def _unfinished(folder: Path) -> set[str]:
    """The checkpoints in a folder that are being written: hidden, and not old ones on their way out."""
    try:
        return {name for name in os.listdir(folder) if name.startswith(".step-") and not name.endswith(".old")}
    except OSError:
        return set()


def _uploading(folder: Path) -> set[str]:
    """The newest checkpoint at an upload's target where it is not whole: its state.json comes last."""
    newest_there = sorted(folder.glob("step-*"))[-1:]
    return {place.name for place in newest_there if not (place / "state.json").is_file()}


def _writers(workers: list[int], folder: Path) -> list[int]:
    """The workers that have a file below the folder open."""
    return [pid for pid in workers if any(str(folder) in target for target in _open_files(pid))]


def _open_files(pid: int) -> list[str]:
    found = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            found.append(os.readlink(entry.path))
    except OSError:
        pass
    return found


# A full disk


def full_disk(base: Base) -> Iterator[Case]:
    """A disk with room for one checkpoint and a half; then with more, which another program fills; then with all of it."""
    for workers, settings in ((0, ONE), (2, (f"train.steps={SHORT}",))):
        reference = base.reference(*settings)
        size = sum(path.stat().st_size for path in (reference / f"checkpoints/step-{SHORT:06d}").iterdir())
        disk = base.place / f"disk-{workers}"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", disk]).returncode:
            said = "a small disk could not be had here: mounting a tmpfs needs root"
            yield case(f"a full disk, {workers} workers", said, False)
            continue
        try:
            yield from _fill(base, disk, 12 * size, settings, reference, f", {workers} workers")
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def _fill(base: Base, disk: Path, enough: int, settings: tuple[str, ...], reference: Path, workers: str) -> Iterator[Case]:
    run, filler = disk / "run", disk / "filler"
    command = base.start(str(run), *settings)
    yield _refused(base, command, f"a disk that a checkpoint fills{workers}", run, [EVERY])

    # No more room than a run needs: what fills it has to be done before the next checkpoint.
    subprocess.run(["mount", "-o", f"remount,size={enough}", disk], check=True)
    command = base.start(str(run), *settings)
    wait(lambda: command.ended or reached(run) >= 2 * EVERY + 2, START, 0.01)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    yield _refused(
        base, command, f"then one that another program fills between two checkpoints{workers}", run, [EVERY, 2 * EVERY]
    )

    filler.unlink()
    command = base.start(str(run), *settings)
    code = command.finish()
    problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
    said = problem or "went on to the end; losses equal in every digit, the model in every byte"
    yield case(f"then with room again{workers}", said, not problem)


def _refused(base: Base, command: Command, name: str, run: Path, wanted: list[int]) -> Case:
    """The case of a command that must end with one line about the disk, and keep the wanted checkpoints."""
    code, kept = command.finish(), checkpoints(run)
    said = command.refusal or f"{'a traceback: ' if 'Traceback' in command.output else ''}{command.last_line}"
    ok = code == 2 and bool(command.refusal) and "space" in said and kept == wanted
    return case(name, f"exit code {code}, checkpoints {kept}: {_short(said, base)}", ok)


# Damaged checkpoints


def corrupt(base: Base) -> Iterator[Case]:
    """The last of two checkpoints is damaged: each way in a copy of one stopped run."""
    reference = base.reference(*ONE)
    stopped = base.place / "stopped"
    command = base.start("stopped", *ONE)
    wait(lambda: command.ended or reached(stopped) >= 3 * EVERY + 2, START, 0.01)
    command.end()
    assert checkpoints(stopped) == [2 * EVERY, 3 * EVERY], checkpoints(stopped)
    damages: dict[str, Callable[[Path], None]] = {
        "one bit of model.safetensors flipped": lambda folder: _flip(folder / "model.safetensors"),
        "one bit of optimizer.safetensors flipped": lambda folder: _flip(folder / "optimizer.safetensors"),
        "optimizer.safetensors cut in half": lambda folder: _cut(folder / "optimizer.safetensors"),
        "model.safetensors missing": lambda folder: (folder / "model.safetensors").unlink(),
        "state.json is garbage": lambda folder: (folder / "state.json").write_bytes(b"\0garbage"),
    }
    for number, (what, damage) in enumerate(damages.items()):
        run = base.place / f"damaged-{number}"
        shutil.copytree(stopped, run)
        last = f"step-{3 * EVERY:06d}"
        damage(run / "checkpoints" / last)
        command, seen = base.start(run.name, *ONE), [reached(run)]
        wait(lambda run=run, command=command, seen=seen: seen.append(reached(run)) or command.ended, START, 0.01)
        code, start = command.finish(), min(seen)
        told = last in command.output
        problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
        if code == 0:
            outcome = (
                f"went on from step {start}; {problem or 'losses equal in every digit'}{'' if told else '; it said nothing'}"
            )
        else:
            outcome = problem
        yield case(f"last checkpoint damaged: {what}", outcome, told and not problem and start == 2 * EVERY)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# A loss that is no number


def diverged(base: Base) -> Iterator[Case]:
    """A rate of 1e30: it stops at once and names the step and the rows; what was saved before stays."""
    for workers in (0, 2):
        run = base.place / f"diverged-{workers}"
        settings = (f"compute.workers={workers}", "train.rate=1.0e+30", "train.checkpoint_every=1", f"train.steps={SHORT}")
        command = base.start(run.name, *settings)
        code = command.finish()
        kept, said = checkpoints(run), command.refusal
        named = "step " in said and "rows " in said
        ok = code == 2 and named and kept == list(range(max(1, reached(run) - 1), reached(run) + 1)) and reached(run) < SHORT
        outcome = f"exit code {code}, checkpoints {kept}: {_short(said or command.last_line, base)}"
        yield case(f"a loss that is no number, {workers} workers", outcome, ok)


# Preemption


def preempted(base: Base) -> Iterator[Case]:
    """SIGTERM to the driver: it saves the step it is at, says so and leaves with 143; also while its workers start."""
    for workers, settings in ((0, ONE), (2, (f"train.steps={SHORT}",))):
        reference, run = base.reference(*settings), base.place / f"preempted-{workers}"
        if workers:
            command = base.start(run.name, *settings)
            wait(lambda command=command: command.ended or named(command.pid, WORKER), START, 0.1)
            yield _told(base, command, run, "preemption (SIGTERM) while the workers start")
        command = base.start(run.name, *settings)
        wait(lambda run=run, command=command: command.ended or reached(run) >= EVERY + 3, START, 0.01)
        yield _told(base, command, run, f"preemption (SIGTERM) during a step, {workers} workers")
        command = base.start(run.name, *settings)
        code = command.finish()
        problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
        outcome = problem or "went on to the end; losses equal in every digit, the model in every byte"
        yield case(f"preemption, then the same command, {workers} workers", outcome, not problem)


def _told(base: Base, command: Command, run: Path, name: str) -> Case:
    """SIGTERM now: the case of a command that must save the step it is at, say so and leave."""
    command.look()
    at, began = reached(run), time.monotonic()
    if not command.ended:
        os.kill(command.pid, signal.SIGTERM)
    code = command.finish(DEATH)
    seconds, kept = time.monotonic() - began, newest(run)
    ok = code == 143 and kept >= at and "Traceback" not in command.output
    said = f"exit code {code} after {seconds:.0f} s" if code is not None else f"still there after {seconds:.0f} s"
    return case(name, f"told at step {at}, {said}, last checkpoint {kept}: {_short(command.last_line, base)}", ok)


def _short(text: str, base: Base) -> str:
    """A line for a table: without this machine's folders, and not too long."""
    text = text.replace(f"{base.place}/", "").replace("|", "/")
    return text if len(text) <= 240 else text[:237] + "..."
