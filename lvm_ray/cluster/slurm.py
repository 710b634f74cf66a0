"""The target `slurm`: a batch job whose script makes a Ray cluster of the nodes it is given, and runs the verb on it.

Recipe and code are copied into the job's folder, which every node sees, since Slurm's clusters share the home folder (or name one
by LVM_RAY_HOME): a job that waits in the queue for a day runs what was submitted, whatever was edited since. Nodes, partition and
time are the template's `#SBATCH` lines, or sbatch's own environment (SBATCH_PARTITION, SBATCH_TIMELIMIT, ...).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lvm_ray.cluster import folder
from lvm_ray.cluster.commands import run
from lvm_ray.cluster.submission import Job, State, Submission, Where
from lvm_ray.errors import UserError

TEMPLATE = Path(__file__).parent / "files" / "slurm" / "job.sh"
INSTALL = "submit from a login node of the Slurm cluster"
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SUSPENDED", "STOPPED")


def described(where: Where, submission: Submission) -> dict[str, Any]:
    """The sbatch command with what it adds to its environment, and what is copied before."""
    place = folder.home() / submission.name
    copied = {f"files/{name}": f"{len(content):,} bytes" for name, content in submission.files.items()}
    assert submission.package is not None
    return {
        "to": "sbatch",
        "submission_id": submission.name,
        "entrypoint": submission.entrypoint,
        "env_vars": _environment(submission),
        "working_dir": str(place / "files"),
        "command": shlex.join(_command(where, submission)),
        "copied": {"folder": str(place), **copied, submission.package.name: f"{len(submission.package.content):,} bytes"},
    }


def submit(where: Where, submission: Submission) -> int:
    """Copy what travels, and queue the job."""
    template = Path(where.template) if where.template else TEMPLATE
    if not template.is_file():
        raise UserError(f"{template}: no such batch script: take cluster/slurm/job.sh as a start")
    _queue(submission.name)  # before anything is written: whether there is a Slurm
    shown = folder.prepare(submission, {"slurm": True})
    place = str(folder.home() / submission.name / "files")
    run(_command(where, submission), INSTALL, environment=_environment(submission), folder=place)
    return shown


def status(where: Where, name: str | None = None) -> list[Job]:
    """The job of a name, or none; all that were ever submitted from here."""
    queued = _queue(name)
    known = [one for one in folder.names() if name in (None, one) and "slurm" in folder.facts(one)]
    return [_job(one, *queued[one][1:]) if one in queued else folder.ended_job(one) for one in known]


def logs(where: Where, name: str) -> str:
    """What the batch script has printed, in all attempts."""
    return folder.log(name)


def stop(where: Where, name: str) -> None:
    """Ask the batch script to end, which has the verb save and leave; take a job that waits out of the queue."""
    for number, state, _ in _queue(name).values():
        gently = [] if state in WAITING else ["--batch", "--signal=TERM"]
        run(["scancel", *gently, number], INSTALL)


def _command(where: Where, submission: Submission) -> list[str]:
    place = folder.home() / submission.name
    return [
        "sbatch",
        "--parsable",
        f"--job-name={submission.name}",
        "--dependency=singleton",  # of two that are sent at the same moment one waits, and then finds the work done
        f"--output={place / 'log'}",
        "--open-mode=append",
        "--export=ALL",
        str(Path(where.template).absolute() if where.template else TEMPLATE),
        *folder.wrapped(submission.name, submission.command),
    ]


def _environment(submission: Submission) -> dict[str, str]:
    place = folder.home() / submission.name
    modules = os.pathsep.join(filter(None, [str(place / "package"), os.environ.get("PYTHONPATH")]))
    # The programs of the environment that this command runs in, whether or not somebody has activated it.
    programs = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    return {**submission.environment, "PATH": programs, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}


def _queue(name: str | None) -> dict[str, tuple[str, str, str]]:
    """The user's jobs in the queue by name: number, state, reason or nodes."""
    chosen = [f"--name={name}"] if name else []
    text = run(["squeue", "--me", "--noheader", "--format=%j|%i|%T|%R", *chosen], INSTALL)
    lines = [line.strip().split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return {job: (number, state, reason) for job, number, state, reason in lines}


def _job(name: str, slurm_state: str, reason: str) -> Job:
    known = folder.facts(name)
    state: State = "waiting" if slurm_state in WAITING else "running"
    return Job(name, state, reason, started=known.get("started"), fingerprint=known.get("fingerprint"))
