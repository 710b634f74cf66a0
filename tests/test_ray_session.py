"""Ray beside the training: what it runs for itself computes where training leaves a core alone, and ends with it."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from lvm_ray import ray_session as session

linux = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux can have processes compute where others leave room")


class Helper:
    def pid(self) -> int:
        return os.getpid()


class TrainWorker(Helper):
    pass


@linux
def test_helpers_yield_and_training_workers_do_not(ray_session, monkeypatch):
    import ray

    actors = [ray.remote(num_cpus=0)(one).remote() for one in (Helper, TrainWorker)]
    helper, worker = ray.get([actor.pid.remote() for actor in actors])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    session.let_helpers_yield()
    assert os.sched_getscheduler(helper) == os.SCHED_OTHER, "others' clusters are left alone"
    monkeypatch.delenv("RAY_ADDRESS")
    session.let_helpers_yield()
    threads = [int(thread) for thread in os.listdir(f"/proc/{helper}/task")]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(worker) == os.sched_getscheduler(os.getpid()) == os.SCHED_OTHER


STUCK = """
import os, signal
import ray
from lvm_ray import ray_session

ray_session.PATIENCE = 1.0
ray_session.start(1)
actor = ray.remote(num_cpus=0)(type("Stuck", (), {"pid": lambda self: os.getpid()})).remote()
pid = ray.get(actor.pid.remote())
os.kill(pid, signal.SIGSTOP)  # it will not notice that its Ray has gone
print(pid)
"""


def test_no_process_outlives_the_command_that_started_ray():
    found = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=True, timeout=120)
    until = time.monotonic() + 10
    while left := [one.pid for one in psutil.process_iter() if one.pid == int(found.stdout) and session._lives(one)]:
        assert time.monotonic() < until, f"{left} go on"
        time.sleep(0.05)
