"""submit, status, logs and stop, for whatever target: what is sent, said, followed and waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import cast

import yaml

from lvm_ray.cluster.arrival import ARRIVED, IMAGE
from lvm_ray.cluster.submission import Job, Submission, Target, Where, reason_of
from lvm_ray.errors import Stopped, UserError
from lvm_ray.progress import duration, say, stage, table

TARGETS = {"local": "local", "ray": "ray_jobs", "k8s": "kubernetes", "slurm": "slurm"}
STARTS_WITHIN = {"local": 8.0, "ray": 14.0}  # seconds in which a job that cannot run has said so; others wait for machines
STOPS_WITHIN = 150.0  # seconds
FIRST_CHECKS = 2.0  # seconds after a job has arrived in which its verb has refused bad input
PAUSES = (0.5, 5.0)  # seconds between two looks at a job: at first, and at the most
PATIENCE = 300.0  # seconds in which a job's target may be out of reach


def submit(where: Where, submission: Submission, costs: str, follow: bool, dry_run: bool) -> int:
    """Send a verb, or say what would be sent; an exit code.

    A job of the same name that runs is followed instead: nothing is sent twice. One that has ended is sent again, and resumes.
    Raises UserError where it cannot be sent, or says within its first seconds that it cannot run, and where another job of that
    name runs.
    """
    target = _target(where)
    if dry_run:
        values = {**target.described(where, submission), "resources": list(submission.resources)}
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) + costs)
        return 0
    name = submission.name
    before = next(iter(target.status(where, name)), None)
    if before and not before.is_over:
        if before.fingerprint != submission.fingerprint:
            raise UserError(
                f"{name}: {before.state} already, with other arguments, another recipe or other code: follow it "
                f"(lvm-ray logs {name}{flags(where)} --follow), stop it first, or give this one a name of its own with --name"
            )
        say(f"{name}: {before.state} already{_since(before)}: nothing new is sent")
        shown = 0
    else:
        shown = target.submit(where, submission)
        say(f"{name}: sent" + (" again: what is done already stays done" if before else ""))
    if follow:
        return _follow(target, where, name, shown)
    if not (before and not before.is_over):
        _see_it_start(target, where, name, shown)
    for verb in ("status", "logs", "stop"):
        say(f"  lvm-ray {verb} {name}{flags(where)}{' --follow' if verb == 'logs' else ''}")
    return 0


def status(where: Where, name: str | None) -> None:
    """Print how a job is, or a table of all. Raises UserError where there is none of that name."""
    jobs = _target(where).status(where, name)
    if name is None:
        rows = [[job.name, job.state, _since(job).strip(" ()"), job.detail] for job in jobs]
        table(f"jobs, {where.to}", ["name", "state", "", ""], rows)
        return
    job = _one(jobs, where, name)
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    say(f"{name}: {job.state}{code}{_since(job)}{f': {job.detail}' if job.detail else ''}")


def logs(where: Where, name: str, follow: bool) -> int:
    """Print what a job has printed, and go on until it ends; an exit code."""
    target = _target(where)
    job = _one(target.status(where, name), where, name)
    if follow:
        return _follow(target, where, name, 0)
    _show(target.logs(where, name))
    if job.state == "waiting":
        say(f"{name}: waits to begin{_since(job)}{f': {job.detail}' if job.detail else ''}")
    return 0


def stop(where: Where, name: str) -> None:
    """Have a job save and leave, and wait until it has. Raises UserError where it does not."""
    target = _target(where)
    job = _one(target.status(where, name), where, name)
    if job.is_over:
        say(f"{name}: {job.state} already{_since(job)}")
        return
    with stage(f"stop {name}") as bar:
        target.stop(where, name)
        until = time.monotonic() + STOPS_WITHIN
        while (found := next(iter(target.status(where, name)), None)) and not found.is_over:
            if time.monotonic() > until:
                raise UserError(f"{name}: still {found.state} after {STOPS_WITHIN:.0f} s: lvm-ray status {name}{flags(where)}")
            time.sleep(PAUSES[0])
        bar.set(1, note="submit it again to go on")


def flags(where: Where) -> str:
    """The flags that lead to the same place again."""
    named: Mapping[str, str | None] = {"address": where.address, "namespace": where.namespace}
    return f" --to {where.to}" + "".join(f" --{key} {value}" for key, value in named.items() if value)


def _target(where: Where) -> Target:
    return cast(Target, import_module(f"lvm_ray.cluster.{TARGETS[where.to]}"))


def _one(jobs: Sequence[Job], where: Where, name: str) -> Job:
    if not jobs:
        raise UserError(f"{name}: no such job: lvm-ray status{flags(where)} lists those that there are")
    return jobs[0]


def _see_it_start(target: Target, where: Where, name: str, shown: int) -> None:
    """Wait until a job has found all that it needs. Raises UserError with its own words where it has not."""
    until = time.monotonic() + STARTS_WITHIN.get(where.to, 0)
    while time.monotonic() < until:
        job = _one(target.status(where, name), where, name)
        log = target.logs(where, name)[shown:]
        if job.is_over:
            _outcome(job, log)
            return
        if ARRIVED in log:
            until = min(until, time.monotonic() + FIRST_CHECKS)  # in which the verb's own first checks are over
        time.sleep(PAUSES[0])


def _follow(target: Target, where: Where, name: str, shown: int) -> int:
    """Print a job's log as it grows, from letter `shown` on, until the job ends; an exit code. Ctrl-C leaves the job alone."""
    pause, answered, first = PAUSES[0], time.monotonic(), shown
    try:
        while True:
            try:
                jobs = target.status(where, name)
                text = target.logs(where, name)  # asked for after the state: of an ended job it is whole
            except UserError:
                if time.monotonic() - answered > PATIENCE:
                    raise
                time.sleep(PAUSES[1])
                continue
            job, answered = _one(jobs, where, name), time.monotonic()
            if 0 < len(text) < shown:  # of a new head or a new pod, which knows nothing of earlier attempts
                first = shown = 0
            _show(text[shown:])
            if job.is_over:
                return _outcome(job, text[first:])
            pause = PAUSES[0] if len(text) > shown else min(pause * 1.5, PAUSES[1])
            shown = max(shown, len(text))
            time.sleep(pause)
    except KeyboardInterrupt:
        say(f"\n{name} goes on: lvm-ray logs {name}{flags(where)} --follow, or lvm-ray stop {name}{flags(where)}")
        return 130


def _outcome(job: Job, log: str) -> int:
    """The exit code of a job that has ended: 0, or 1 where the failure is ours and its traceback is in the log.

    Raises UserError where its input or its machine was at fault, with its own words, and Stopped where it was asked to leave.
    """
    if job.state == "succeeded":
        say(f"{job.name}: succeeded{_since(job)}")
        return 0
    if job.state == "stopped":
        raise Stopped(f"{job.name}: stopped{f': {job.detail}' if job.detail else ''}; submit it again to go on")
    reason = reason_of(log) or job.detail or "no reason given"
    if job.exit_code == 1 and "Traceback" in log and IMAGE not in reason:
        print(f"{job.name}: failed with exit code 1: {reason}: its traceback stands in its log", file=sys.stderr)
        return 1
    raise UserError(f"{job.name}: failed{'' if job.exit_code is None else f' with exit code {job.exit_code}'}: {reason}")


def _show(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _since(job: Job) -> str:
    """When it began and how long it took, in words after a state; empty where nobody knows."""
    if not job.started:
        return ""
    began = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M")
    return f" (since {began}, {duration(max((job.ended or time.time()) - job.started, 0.0))})"
