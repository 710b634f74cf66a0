"""What a submitted job does before its verb: it looks whether it can work here, and says so within seconds.

A job knows that it is one by LVM_RAY_JOB, its name. Its first line is what `submit` waits for. This file imports nothing of
others, since what is missing here may be any of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from lvm_ray.errors import UserError

JOB = "LVM_RAY_JOB"
ARRIVED = "packages and storage checked"
STORAGE_ANSWERS = 5.0  # seconds
BEGINS_WITHIN = 15.0  # seconds that a Python takes beside that to begin
SILENT = f"{{}}: its storage does not answer within {STORAGE_ANSWERS:.0f} s"
IMAGE = "use an image with lvm-ray's requirements, as cluster/Dockerfile makes it"
# Modules of the project's dependencies: a wheel that travels cannot bring them.
MODULES = (
    *("ray", "torch", "deepspeed", "transformers", "safetensors", "pyarrow", "numpy", "scipy", "skimage", "diffusers"),
    *("pycocotools", "PIL", "optuna", "pydantic", "psutil", "yaml", "jinja2", "rich", "tensorboardX"),
)


def is_job() -> bool:
    """Whether this process was submitted."""
    return bool(os.environ.get(JOB))


def missing_modules() -> list[str]:
    """The modules of our requirements that this Python lacks. Imports none of them."""
    return [name for name in MODULES if find_spec(name) is None]


def check_storage(run: str) -> None:
    """Say that the job has arrived. Raises UserError where its run cannot be written, also where its storage does not answer.

    A process of its own asks, since a file system's client that waits for a server cannot be told to give up.
    """
    command = [sys.executable, "-m", "lvm_ray.cluster.arrival", run]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        _, said = process.communicate(timeout=BEGINS_WITHIN + STORAGE_ANSWERS)
        problem = said.strip().splitlines()[-1:] if process.returncode else []
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a process that a network disk keeps waiting ends when that does
        problem = [SILENT.format(run)]
    if problem:
        raise UserError(f"{problem[0]}: give --run a place that the job's machine can write, and that machine the right to")
    print(f"{os.environ[JOB]}: {ARRIVED}; lvm_ray of {Path(__file__).parents[1]}", flush=True)


def _write_once(run: str) -> None:
    """Write a file below the run and remove it; in time, or the process ends with 1 and the reason on standard error."""
    import uuid
    from threading import Thread

    from lvm_ray.storage import changing, new_file, open_folder

    problems: list[str] = []

    def write() -> None:
        name = f".arrival-{uuid.uuid4().hex[:8]}"
        try:
            with new_file(run, name) as stream:
                stream.write(b"lvm-ray")
            filesystem, root = open_folder(run)
            with changing(run):
                filesystem.delete_file(f"{root}/{name}")
        except Exception as error:  # whatever a file system's client may raise
            problems.append(str(error) if isinstance(error, UserError) else f"{run}: {type(error).__name__}: {error}")

    thread = Thread(target=write, daemon=True)
    thread.start()
    thread.join(STORAGE_ANSWERS)
    if thread.is_alive():
        problems.append(SILENT.format(run))
    print(*problems, sep="\n", file=sys.stderr, flush=True)
    os._exit(bool(problems))


if __name__ == "__main__":
    _write_once(sys.argv[1])
