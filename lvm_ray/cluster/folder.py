"""A job's folder on a disk that this machine writes, where its target keeps no record of its own: the background, and Slurm.

LVM_RAY_HOME/jobs/demo-train-3fa2c1/
    job.json    what was sent, and when
    log         what it has printed, in all attempts
    pid         of the verb's process, where it runs on this machine
    exit        the verb's exit code, once it has one
    run.sh      runs the verb and leaves the two above
    files/      what the arguments name;  package/  the wheel, unpacked
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

from lvm_ray.cluster.submission import Job, State, Submission
from lvm_ray.errors import UserError
from lvm_ray.storage import changing

# Runs the verb as a child, leaves its process id and its exit code, and hands a request to stop on to the verb alone, which stops
# what it has started. `wait` returns early at a signal, so it is asked again for as long as the child lives.
RUN = """folder=$(dirname "$0")
trap 'kill -TERM $child' TERM
"$@" & child=$!
echo $child > "$folder/pid"
while :; do wait $child; code=$?; kill -0 $child 2> /dev/null || break; done
echo $code > "$folder/exit"
exit $code
"""


def home() -> Path:
    """Where the folders of jobs are."""
    return Path(os.environ.get("LVM_RAY_HOME") or Path.home() / ".cache" / "lvm-ray").absolute() / "jobs"


def wrapped(name: str, command: tuple[str, ...]) -> list[str]:
    """The command that runs a job's and keeps its exit code."""
    return ["sh", str(home() / name / "run.sh"), *command]


def prepare(submission: Submission, facts: dict[str, Any]) -> int:
    """Make the folder of a new attempt: how many letters of the log are of earlier ones. Raises UserError where it cannot."""
    folder = home() / submission.name
    with changing(str(folder)):
        for place in ("files", "package"):
            shutil.rmtree(folder / place, ignore_errors=True)
        for mark in ("exit", "pid"):
            (folder / mark).unlink(missing_ok=True)
        (folder / "files").mkdir(parents=True)
        for name, content in submission.files.items():
            (folder / "files" / name).write_bytes(content)
        if submission.package:
            zipfile.ZipFile(io.BytesIO(submission.package.content)).extractall(folder / "package")
        (folder / "run.sh").write_text(RUN, encoding="ascii")
        values = {"fingerprint": submission.fingerprint, "started": time.time(), **facts}
        (folder / "job.json").write_text(json.dumps(values), encoding="utf-8")
    return len(log(submission.name))


def names() -> list[str]:
    """The jobs that have a folder."""
    return sorted(path.parent.name for path in home().glob("*/job.json"))


def facts(name: str) -> dict[str, Any]:
    """What is known of a job; empty where nothing is."""
    try:
        found: dict[str, Any] = json.loads((home() / name / "job.json").read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{home() / name / 'job.json'}: cannot be read ({error}): remove that folder") from None


def log(name: str) -> str:
    """What a job has printed."""
    path = home() / name / "log"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def number(name: str, mark: str) -> int | None:
    """The number in a job's `pid` or `exit`; None where there is none yet."""
    path = home() / name / mark
    text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def ended_job(name: str) -> Job:
    """A job that is known to run no more, by what it left behind."""
    known, code = facts(name), number(name, "exit")
    state: State = "succeeded" if code == 0 else "stopped" if code in (None, 130, 143) else "failed"
    mark = home() / name / "exit"
    return Job(
        name=name,
        state=state,
        detail="it left no exit code: it was killed, or never began" if code is None else "",
        started=known.get("started"),
        ended=mark.stat().st_mtime if mark.is_file() else None,
        exit_code=code,
        fingerprint=known.get("fingerprint"),
    )
