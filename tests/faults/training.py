"""Training that is killed, starved of disk, handed a damaged checkpoint, diverging, preempted.

Every case is a real run of the command line, and every kill a SIGKILL. The measure is an undisturbed run of the same command:
each step once, losses and gradient norms equal in every digit, the model's file equal in every byte.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.processes import kill, named, wait
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
START = 120.0  # seconds to the first new step of a command or of restarted workers


# Kills


def kills(base: Base) -> Iterator[Case]:
    """Worker, driver and raylet, each during a step and during a checkpoint's write, all in one run."""
    victims = ("a worker", "the driver", "the raylet")
    yield from _chain(base, "killed", [(victim, phase) for victim in victims for phase in ("a step", "a write")], ())
    yield from _chain(base, "killed-alone", [("the driver", "a step"), ("the driver", "a write")], ONE)


def uploads(base: Base) -> Iterator[Case]:
    """Worker, driver and raylet while a checkpoint is uploaded, in one run at a URI."""
    victims = ("a worker", "the driver", "the raylet")
    target = f"file://{base.place}/target/uploaded"
    yield from _chain(base, target, [(victim, "an upload") for victim in victims], ())


def _chain(base: Base, name: str, events: list[tuple[str, str]], settings: tuple[str, ...]) -> Iterator[Case]:
    """One run through all kills to its end: a case each, and one for the finished run."""
    reference = base.reference(*settings)
    run = Path(name.removeprefix("file://")) if "://" in name else base.place / name
    alone = "" if settings == () else ", workers: 0"
    command: Command | None = None
    for victim, phase in events:
        if command is None or command.ended:
            command = base.start(name, *settings)
        outcome, ok = _kill(command, run, victim, phase)
        if ok:
            began, code = time.monotonic(), None
            if victim != "a worker":
                code = _code_after(command)
                ok = code is not None
                outcome += f", the command {f'ended with {code} after {time.monotonic() - began:.0f} s' if ok else 'hung'}"
            old, lowest = command, newest(run)
            if command.ended or not ok:
                command = base.start(name, *settings)
            went_on, problem = _goes_on(command, run, reference, lowest)
            outcome += f"; {went_on} {time.monotonic() - began:.0f} s after the kill"
            outcome += f", but {problem}" if problem else ", losses equal"
            ok = ok and not problem
            if old is not command:
                old.end()
        yield case(f"SIGKILL of {victim} during {phase}{alone}", outcome, ok)
    assert command is not None
    code = command.finish()
    if code != 0:  # killed workers have used up Ray's restarts
        command = base.start(name, *settings)
        code = command.finish()
    problem = differs(run, reference) if code == 0 else f"exit code {code}: {command.last_line}"
    lines = len(journal(run))
    kind = f"{len(events)} kills during steps and {'uploads' if '://' in name else 'writes'}{alone}"
    said = problem or f"{lines} steps, each once; losses equal in every digit, the model in every byte"
    yield case(f"the run after {kind}", said, not problem)


def _kill(command: Command, run: Path, victim: str, phase: str) -> tuple[str, bool]:
    """Wait until the run is in the phase and kill the victim then. What happened, and whether it did in time."""
    folder = run / "checkpoints"
    begun = newest(run)
    # Into a stretch of its own: after a checkpoint that this command's own workers have written.
    alone = victim == "the driver" and "compute.workers=0" in command.settings
    if not wait(lambda: command.ended or newest(run) > begun or (begun == 0 and reached(run) > 2), START, 0.02):
        return "no new checkpoint to be seen", False
    command.look()
    workers = [] if alone else named(command.pid, WORKER)
    pids = {"a worker": workers[:1], "the driver": [command.pid], "the raylet": named(command.pid, RAYLET)}[victim]
    if not pids:
        return f"no process of {victim} to be found; the last line is: {command.last_line}", False
    in_phase: Callable[[], bool] = {
        "a step": lambda: 2 <= reached(run) % EVERY <= EVERY - 3 and not _hidden(folder),
        "a write": lambda: _hidden(folder),
        "an upload": lambda: _hidden(folder, below=True),
    }[phase]
    if phase == "a write":
        wait(lambda: command.ended or not _hidden(folder), 10, 0.001)  # what an earlier kill left is removed first
    if not wait(lambda: command.ended or in_phase(), START, 0.001) or command.ended:
        return f"the run {'ended' if command.ended else 'never came to that'}: {command.last_line}", False
    if phase == "a write" and victim == "a worker":
        pids = _writers(workers, folder) or pids
    kill(pids)
    step, whole = reached(run), newest(run)
    return f"at step {step} (last checkpoint {whole})", True


def _code_after(command: Command) -> int | None:
    """The exit code of a command that lost its driver or its raylet; None where it hangs."""
    wait(lambda: command.ended, DEATH)
    code = command.process.poll()
    if code is None:
        command.end()
    return code


def _goes_on(command: Command, run: Path, reference: Path, lowest: int) -> tuple[str, str]:
    """Wait for the journal to be cut at a checkpoint and to grow over the next one: what was seen, and what is wrong."""
    steps = [reached(run)]

    def grown() -> bool:
        steps.append(reached(run))
        cut = min(steps)
        return command.ended or (cut < max(steps) and steps[-1] >= cut + EVERY)

    if not wait(grown, START, 0.02):
        return "stood still at step " + str(steps[-1]), "nothing more came"
    cut = min(steps)
    found = [line for line in journal(run) if line["step"] <= steps[-1]]
    problem = lines_differ(found, journal(reference)[: len(found)])
    if command.ended and reached(run) < len(journal(reference)):
        problem = f"it ended with {command.process.poll()}: {command.last_line}"
    elif cut < lowest:
        problem = problem or f"there was a checkpoint of step {lowest}"
    return f"went on from step {cut}", problem


def _hidden(folder: Path, below: bool = False) -> bool:
    """Whether a folder of checkpoints holds something unfinished, by its name; `below`: in a checkpoint, too."""
    try:
        with os.scandir(folder) as entries:
            return any(
                entry.name.startswith(".") or (below and entry.is_dir() and _hidden(Path(entry.path))) for entry in entries
            )
    except OSError:
        return False


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
    """A disk with room for one checkpoint and a half; then with more."""
    for workers, settings in ((0, ONE), (2, (f"train.steps={SHORT}",))):
        reference = base.reference(*settings)
        size = sum(path.stat().st_size for path in (reference / f"checkpoints/step-{SHORT:06d}").iterdir())
        disk = base.place / f"disk-{workers}"
        disk.mkdir()
        name = f"a full disk, {workers} workers"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", disk]).returncode:
            yield case(name, "a small disk could not be had here: mounting a tmpfs needs root", False)
            continue
        try:
            yield from _fill(base, disk, settings, reference, name)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def _fill(base: Base, disk: Path, settings: tuple[str, ...], reference: Path, name: str) -> Iterator[Case]:
    run = disk / "run"
    command = base.start(str(run), *settings)
    code = command.finish()
    kept = checkpoints(run)
    said = command.refusal or f"{'a traceback: ' if 'Traceback' in command.output else ''}{command.last_line}"
    ok = code == 2 and bool(command.refusal) and "space" in said and kept == [EVERY]
    yield case(name, f"exit code {code}, checkpoints {kept}: {_short(said, base)}", ok)
    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
    command = base.start(str(run), *settings)
    code = command.finish()
    problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
    yield case(f"{name}, then with room", problem or "went on to the end; losses equal in every digit", not problem)


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
        command = base.start(run.name, *ONE)
        code = command.finish()
        told = last in command.output
        problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
        outcome = problem or f"went on from step {2 * EVERY} to the end; losses equal in every digit"
        yield case(f"last checkpoint damaged: {what}", outcome + ("" if told else "; it did not say so"), told and not problem)


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
    """SIGTERM to the driver: it saves the step it is at, says so and leaves with 143."""
    for workers, settings in ((0, ONE), (2, (f"train.steps={SHORT}",))):
        reference, run = base.reference(*settings), base.place / f"preempted-{workers}"
        command = base.start(run.name, *settings)
        wait(lambda run=run, command=command: command.ended or reached(run) >= EVERY + 3, START, 0.01)
        command.look()
        at, began = reached(run), time.monotonic()
        os.kill(command.pid, signal.SIGTERM)
        code = command.finish(60)
        seconds, kept = time.monotonic() - began, newest(run)
        said = _short(command.last_line, base)
        ok = code == 143 and kept >= at and "Traceback" not in command.output
        outcome = f"told at step {at}, exit code {code} after {seconds:.0f} s, last checkpoint {kept}: {said}"
        yield case(f"preemption (SIGTERM), {workers} workers", outcome, ok)
        command = base.start(run.name, *settings)
        code = command.finish()
        problem = differs(run, reference) if code == 0 else f"exit code {code}: {_short(command.last_line, base)}"
        outcome = problem or "went on to the end; losses equal in every digit, the model in every byte"
        yield case(f"preemption, {workers} workers, then the same command", outcome, not problem)


def _short(text: str, base: Base) -> str:
    """A line for a table: without this machine's folders, and not too long."""
    text = text.replace(f"{base.place}/", "").replace("|", "/")
    return text if len(text) <= 240 else text[:237] + "..."
