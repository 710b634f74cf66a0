"""The target `ray`: Ray's own job server, which runs a command on the head of a running cluster.

The package and the files travel into the cluster's store under names with their content's hash, and Ray unpacks them for the
driver and for every worker. The wheel goes as a zip, which it is: under a name that ends in .whl every node would need a pip on
its PATH.

Ray takes a name once. An ended job is deleted before its name is used again, a few seconds after its end, when Ray's own watch
over it is over: else that would write the old job's end into the new one.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from lvm_ray.cluster.dashboard import Cluster, address_of, ask, ask_values, connect
from lvm_ray.cluster.submission import Job, State, Submission, Where, reason_of
from lvm_ray.errors import UserError
from lvm_ray.storage import redacted

SETTLES = 4.0  # seconds that Ray's watch over an ended job goes on
STOPS_WITHIN = "120"  # seconds that a job has to save before it is killed; Ray gives it three
STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
FINGERPRINT = "lvm_ray_fingerprint"


def described(where: Where, submission: Submission) -> dict[str, Any]:
    """The request as Ray's job server gets it, and what is uploaded before."""
    sizes = {name: f"{len(content):,} bytes" for name, content in _uploads(submission).items()}
    return {"to": f"{address_of(where.address)}/api/jobs/", **_request(submission), "uploads": sizes}


def submit(where: Where, submission: Submission) -> int:
    """Upload what is not there yet, and start the job, in place of an ended one of its name."""
    cluster = connect(where.address)
    before = _jobs(cluster, submission.name)
    shown = len(_log(cluster, submission.name)) if before else 0
    for name, content in _uploads(submission).items():
        place = f"/api/packages/gcs/{quote(name)}"
        if ask(cluster, "GET", place)[0] != 200:
            status, answer = ask(cluster, "PUT", place, content)
            if status != 200:
                reason = (answer.decode(errors="replace").strip().splitlines() or [""])[-1]
                raise UserError(f"{cluster.url}: does not take {name} ({status}): {redacted(reason)[:300]}")
    if before:
        time.sleep(min(max((before[0].ended or 0) + SETTLES - time.time(), 0), SETTLES))
        ask_values(cluster, "DELETE", f"/api/jobs/{quote(submission.name)}")
    ask_values(cluster, "POST", "/api/jobs/", _request(submission))
    return shown


def status(where: Where, name: str | None = None) -> list[Job]:
    """The job of a name, or none; every submitted job of the cluster."""
    return _jobs(connect(where.address), name)


def logs(where: Where, name: str) -> str:
    """What the job has printed, in all attempts on this head."""
    return _log(connect(where.address), name)


def stop(where: Where, name: str) -> None:
    """Ask the job to save and to leave."""
    ask_values(connect(where.address), "POST", f"/api/jobs/{quote(name)}/stop")


def _uploads(submission: Submission) -> dict[str, bytes]:
    assert submission.package is not None
    archive = submission.archive
    found = {f"{submission.package.name}.zip": submission.package.content}
    return found | ({archive.name: archive.content} if submission.files else {})


def _request(submission: Submission) -> dict[str, Any]:
    assert submission.package is not None
    return {
        "submission_id": submission.name,
        "entrypoint": submission.entrypoint,
        "runtime_env": {
            "py_modules": [f"gcs://{submission.package.name}.zip"],
            **({"working_dir": f"gcs://{submission.archive.name}"} if submission.files else {}),
            "env_vars": {**submission.environment, "RAY_JOB_STOP_WAIT_TIME_S": STOPS_WITHIN},
        },
        "metadata": {FINGERPRINT: submission.fingerprint},
    }


def _jobs(cluster: Cluster, name: str | None) -> list[Job]:
    path = "/api/jobs/" if name is None else f"/api/jobs/{quote(name)}"
    found = ask_values(cluster, "GET", path)
    entries = [] if found is None else found if isinstance(found, list) else [found]
    return [_job(entry) for entry in entries if entry.get("submission_id")]


def _job(entry: dict[str, Any]) -> Job:
    message, state = str(entry.get("message") or ""), STATES.get(entry["status"], "waiting")
    times = {key: entry[key] / 1000 if entry.get(key) else None for key in ("start_time", "end_time")}
    return Job(
        name=entry["submission_id"],
        state=state,
        detail=reason_of(message) if state in ("waiting", "failed") else "",
        started=times["start_time"],
        ended=times["end_time"],
        exit_code=entry.get("driver_exit_code"),
        fingerprint=(entry.get("metadata") or {}).get(FINGERPRINT),
    )


def _log(cluster: Cluster, name: str) -> str:
    found = ask_values(cluster, "GET", f"/api/jobs/{quote(name)}/logs")
    return str((found or {}).get("logs", ""))
