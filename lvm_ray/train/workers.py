"""Ray Train's workers, for models and for tokenizers: how many, on what, and what becomes of their errors.

A worker's `UserError` reaches the user as the one line that it is. It travels by way of a file in the run's scratch folder, since
Ray hands the driver a wrapped exception, and only after its restarts. A request to leave goes the other way likewise.

    SCRATCH/complaint.txt   what is wrong with the input: restarts would only fail again
    RUN/.leave              the driver was asked to stop: save and return
    RUN/.owner              the command that the run belongs to: workers that outlive their killed driver find another's
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lvm_ray import ray_session
from lvm_ray.errors import UserError
from lvm_ray.placement import PlaceSection, share
from lvm_ray.progress import say
from lvm_ray.recipe_sections import ComputeSection
from lvm_ray.train import nodes

# Crashed workers are started again this often, from the last checkpoint.
RESTARTS = 2
# Seconds between two questions to Ray whether a node is about to be taken away. All workers ask together.
ASK_EVERY = 5.0

AGAIN = "the same command goes on from the last checkpoint"
ROOM_WITHIN = 600.0  # seconds in which another node may take a lost one's place

COMPLAINT, LEAVE, OWNER = "complaint.txt", ".leave", ".owner"


def run(
    worker: Callable[[], None],
    compute: ComputeSection,
    place: PlaceSection,
    scratch: str | Path,
    datasets: dict[str, Any] | None = None,
    data_config: Any = None,
) -> None:
    """Run a function on `compute.workers` workers at a place until all of them return. `scratch` is made anew and removed at the
    end.

    Raises UserError where a worker does, and where the cluster has not the CPUs.
    """
    ray_session.start(compute.most_workers)
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    nodes.require_cpus(compute.least_workers)
    scratch, gpus = Path(scratch), compute.device == "cuda"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "scratch": str(scratch)},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,  # type: ignore[arg-type]  # a pair is elastic; its annotation is the old one
            use_gpu=gpus,
            resources_per_worker=share(place, gpus),
            label_selector=place.selector or None,  # type: ignore[call-arg]
            # On CPUs a worker computes with more than the one CPU that it asks for: packed, workers would share a node's cores.
            placement_strategy="PACK" if gpus else "SPREAD",
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=RESTARTS),
        ),
        datasets=datasets,
        dataset_config=data_config,
    )
    complaint = scratch / COMPLAINT
    try:
        trainer.fit()
    except WorkerGroupError as error:
        if not complaint.is_file():  # a full disk has no room for it
            raise next((failure for failure in error.worker_failures.values() if isinstance(failure, UserError)), error) from None
    except RayActorError as error:
        raise UserError(f"Ray has ended while its workers trained ({str(error).splitlines()[0]}): {AGAIN}") from None
    if complaint.is_file():
        raise UserError(complaint.read_text(encoding="utf-8"))
    shutil.rmtree(scratch, ignore_errors=True)


def _run_worker(arguments: dict[str, Any]) -> None:
    complaint = Path(arguments["scratch"]) / COMPLAINT
    if complaint.is_file():
        return
    try:
        await_room()
        arguments["worker"]()
    except UserError as error:
        with suppress(OSError):
            write(complaint, str(error))
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error.filename or complaint.parents[1]}: {error.strerror}: make room on that disk; {AGAIN}") from None


def await_room(within: float = ROOM_WITHIN) -> None:
    """Wait until the cluster has a CPU for the data beside the workers, of which this is one.

    Ray starts workers again on what is left of a cluster and does not count what reads their data: they would wait for ever.
    Raises UserError where no node comes within so many seconds.
    """
    import ray.train

    workers, began = ray.train.get_context().get_world_size(), time.monotonic()
    while (cpus := nodes.cpus()) <= workers:
        if time.monotonic() - began >= within:
            raise UserError(
                f"cluster: {cpus} CPUs are left, {workers} workers and one CPU for the data want {workers + 1}: bring nodes "
                f"back, or lower compute.workers; {AGAIN}"
            )
        time.sleep(min(5.0, within))


def write(path: Path, text: str) -> None:
    """A small file that a reader elsewhere sees whole or not at all."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def take_over(run: str | Path) -> str:
    """Make the run this command's own, and no other's. The token that its workers show."""
    token = uuid.uuid4().hex
    write(Path(run) / OWNER, token)
    return token


def give_up(run: str | Path) -> None:
    """The run is finished, and nobody's."""
    (Path(run) / OWNER).unlink(missing_ok=True)


def require_owner(run: str | Path, token: str) -> None:
    """Raises UserError where another command has taken the run over: two must not write into one folder."""
    if not _owns(run, token):
        raise UserError(f"{run}: another command has taken this run over: let that one go on")


def _owns(run: str | Path, token: str) -> bool:
    try:
        return (Path(run) / OWNER).read_text(encoding="utf-8") == token
    except FileNotFoundError:  # lost with the machine's copy of a run at a URI
        return False


def ask_to_leave(run: str | Path, asked: threading.Event) -> None:
    """Have a run save and leave after its step: set the event that it was started with, and for workers the file."""
    asked.set()
    (Path(run) / LEAVE).touch()


@contextmanager
def asked_to_leave(run: str | Path, asked: threading.Event) -> Iterator[None]:
    """While the body works, SIGTERM and the first Ctrl-C ask it to save and to leave: the event, and for workers a file.

    A second Ctrl-C stops at once. Outside a process's first thread, where Python hands out no signals, nothing changes.
    """
    leave = Path(run) / LEAVE
    if not asked.is_set():  # a file that a killed run left behind
        leave.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            leave.unlink(missing_ok=True)
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ask_to_leave(run, asked)
        say(f"{signal.Signals(number).name}: saving after this step, then leaving")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        leave.unlink(missing_ok=True)


def must_leave(run: str | Path, token: str) -> Callable[[], bool]:
    """For a worker: whether to save and return now. All workers call it together and get the same answer.

    They leave where the driver was asked to, and where Ray is about to take one of their nodes away. All raise UserError where
    another command has taken the run over.
    """
    import ray.train
    import torch

    leave = Path(run) / LEAVE
    leader = ray.train.get_context().get_world_rank() == 0
    asked = time.monotonic()

    def answer() -> bool:
        nonlocal asked
        overdue = time.monotonic() - asked > ASK_EVERY
        votes = torch.tensor([leader and found for found in (leave.is_file(), overdue, not _owns(run, token))], dtype=torch.int32)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        if votes[2]:
            require_owner(run, token)
        if votes[1]:
            asked = time.monotonic()
            return bool(votes[0]) or ray.train.get_preemption_info() is not None
        return bool(votes[0])

    return answer
