"""The target `local`: the verb in the background of this machine, with the code and the paths that are here.

It is the verb as it runs in the foreground, with a Ray of its own, only that it outlives the terminal and is watched by the same
verbs as a job elsewhere. A cluster on this machine with a job server is another thing, and the target `ray` sends to it.

Who runs a job holds a lock on its folder, and the system lets go of it when the process ends in whatever way: no process id is
trusted that an other process may have by now.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from lvm_ray.cluster import folder
from lvm_ray.cluster.submission import Job, Submission, Where
from lvm_ray.errors import UserError


def described(where: Where, submission: Submission) -> dict[str, Any]:
    """The command and where it runs."""
    return {
        "to": "the background of this machine",
        "submission_id": submission.name,
        "entrypoint": submission.entrypoint,
        "working_dir": os.getcwd(),
        "env_vars": submission.environment,
        "log": str(folder.home() / submission.name / "log"),
    }


def submit(where: Where, submission: Submission) -> int:
    """Start the verb's process. Raises UserError where another one of its name runs."""
    place = folder.home() / submission.name
    place.mkdir(parents=True, exist_ok=True)
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{submission.name}: is running already: lvm-ray logs {submission.name} --to local --follow") from None
    shown = folder.prepare(submission, {})
    with (place / "log").open("ab") as log:
        subprocess.Popen(
            folder.wrapped(submission.name, (sys.executable, *submission.command[1:])),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **submission.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(lock,),
        )
    os.close(lock)
    return shown


def status(where: Where, name: str | None = None) -> list[Job]:
    """The job of a name, or none; all that were ever started from here."""
    return [_job(one) for one in folder.names() if name in (None, one) and "slurm" not in folder.facts(one)]


def logs(where: Where, name: str) -> str:
    """What the verb has printed, in all attempts."""
    return folder.log(name)


def stop(where: Where, name: str) -> None:
    """Ask the verb to save and to leave."""
    pid = folder.number(name, "pid")
    if pid is not None and _is_running(name):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _job(name: str) -> Job:
    if not _is_running(name):
        return folder.ended_job(name)
    known = folder.facts(name)
    return Job(name, "running", started=known.get("started"), fingerprint=known.get("fingerprint"))


def _is_running(name: str) -> bool:
    lock = os.open(folder.home() / name / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
