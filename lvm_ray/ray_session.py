"""The one place that starts Ray or connects to it: once a process, quietly.

Where `RAY_ADDRESS` is set (a submitted job) the process joins that cluster. Elsewhere it starts a Ray of its own, with
logical CPUs for the workers and two more for Ray Data: a stream without a free CPU hangs without an error. Logical CPUs
only count places; how many threads a worker computes with is the recipe's.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from contextlib import suppress

import psutil

from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.observe import prometheus
from lvm_ray.progress import say

# Read by Ray when it is imported, and by every process that it starts, so they are set before both.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOGGER_LEVEL": "error",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Workers start when they are needed: on two cores four idle Pythons cost a start of Ray two seconds.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
# A Ray of this process's own shares the cores with what it trains, and each of its idle processes wakes a hundred times a second.
_FRUGAL = {
    "RAY_worker_niceness": "0",  # workers that yield to all of Ray's bookkeeping lose a tenth of a training to it
    "RAY_num_workers_soft_limit": "1",  # of idle workers that are kept
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away without a SIGTERM to the command
}
_NEEDED = ("TrainWorker", "IDLE")  # of Ray's processes by name: a training waits for these
PATIENCE = 10.0  # seconds that Ray's processes have to end by themselves
_WATCHERS = ("/log_monitor.py", "/monitor.py", "/dashboard.py")  # Ray's scripts that look at logs and loads, ten times a second


def start(workers: Recipe | int) -> None:
    """Have Ray running for this many training workers (or a recipe's). Does nothing where it already is.

    Raises UserError where `RAY_ADDRESS` names a cluster that does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (_QUIET if address else _QUIET | _FRUGAL).items():
        os.environ.setdefault(name, value)
    import ray

    if address:
        prometheus.begin()
    if ray.is_initialized():
        return
    if address:
        try:
            context = ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"RAY_ADDRESS {address}: no cluster answers ({reason}): start it, or unset RAY_ADDRESS") from None
        say(f"joined the cluster at {address}{links(context.dashboard_url, _job())}")
    else:
        ray.init(
            address="local",
            num_cpus=logical_cpus(workers if isinstance(workers, int) else workers.compute.most_workers),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        atexit.register(shutdown)  # before Ray's own, which leaves processes to themselves


def joined() -> bool:
    """Whether this process works on a cluster that others run, and not on a Ray of its own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def links(dashboard: str | None, job: str) -> str:
    """Where to look at a job in Ray's dashboard, as the end of a sentence; nothing where the cluster has none."""
    if not dashboard:
        return ""
    place = dashboard if "://" in dashboard else f"http://{dashboard}"
    return f": dashboard {place}, this job {place}/#/jobs/{job}"


def _job() -> str:
    """The id that the dashboard lists this job under: of a submitted one its submission's, which its runner hands down."""
    import ray

    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    return str(metadata.get("job_submission_id") or ray.get_runtime_context().get_job_id())


def let_helpers_yield() -> None:
    """Have what Ray runs beside the training workers compute only where these leave a core alone.

    Each of those processes, about ten, wakes a hundred times a second, and a training thread that is put aside for it keeps all
    others waiting: together a tenth of a training. On Linux, and of a Ray of this process's own; new processes need a new call.
    They stay so as long as they live, so processes that wait for other work are left as they are.
    """
    if joined() or not hasattr(os, "SCHED_IDLE"):
        return
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            actor = command.startswith("ray::") and not any(kept in command for kept in _NEEDED)
            if actor or any(script in command for script in _WATCHERS):
                for thread in process.threads():
                    os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))


def logical_cpus(workers: int) -> int:
    """CPUs of a local Ray: one a worker, two for Ray Data, and never fewer than four."""
    return max(4, workers + 2)


def shutdown() -> None:
    """Stop the Ray that this process started, with all of its processes, or leave the cluster that it joined."""
    import ray

    workers: list[psutil.Process] = []
    with suppress(psutil.Error):
        raylets = [] if joined() else [child for child in psutil.Process().children() if child.name() == "raylet"]
        workers = [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    ray.shutdown()
    # They end when they find their raylet gone. A few, once in some hundred times, never do.
    until = time.monotonic() + PATIENCE
    while (left := [worker for worker in workers if _lives(worker)]) and time.monotonic() < until:
        time.sleep(0.05)
    for worker in left:
        with suppress(psutil.Error):
            worker.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)  # which a container may never clear away
    except psutil.Error:
        return False
