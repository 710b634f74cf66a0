"""Questions to the nodes of a cluster, answered by processes there: what a driver cannot see from where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lvm_ray.errors import UserError

ANSWER_WITHIN = 300.0  # seconds that a node has to start a process and to answer


def living_nodes() -> list[dict[str, Any]]:
    """The living nodes of the cluster that run workers."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def cpus() -> int:
    """Of the cluster, busy or not."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def require_cpus(workers: int) -> int:
    """The cluster's CPUs. Raises UserError where they are too few for so many workers and for what reads their data."""
    there = cpus()
    if there <= workers:
        raise UserError(
            f"compute.workers: {workers} workers and one CPU for the data are more than the cluster's {there} CPUs: "
            f"ask for at most {there - 1}"
        )
    return there


def ask_a_worker(question: Callable[..., Any], argument: Any, gpu: bool, place: dict[str, Any]) -> Any:
    """The answer of a process with a training worker's resources, at a place (`placement.options`).

    Raises its UserError, and one where it runs out of memory.
    """
    import ray

    task: Any = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=0, **place)(_answer)
    try:
        complaint, answer = ray.get(task.remote(question, argument))
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError):
        raise UserError(
            "memory: the worker that rehearsed a micro batch was killed, most likely for its memory: lower train.micro_batch"
        ) from None
    if complaint is not None:
        raise UserError(complaint)
    return answer


def ask_nodes(nodes: Sequence[dict[str, Any]], question: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> list[Any]:
    """The answers of nodes to a function of each one's own arguments. Raises the first node's UserError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = []
    for node, own in zip(nodes, arguments, strict=True):
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        remote: Any = ray.remote(num_cpus=0)(_answer)
        asked.append(remote.options(scheduling_strategy=here).remote(question, *own))
    try:
        answers = ray.get(asked, timeout=ANSWER_WITHIN)
    except ray.exceptions.GetTimeoutError:
        raise UserError(f"cluster: a node did not answer within {ANSWER_WITHIN:.0f} s: look at `ray status`") from None
    for complaint, _ in answers:
        if complaint is not None:
            raise UserError(complaint)
    return [answer for _, answer in answers]


def _answer(question: Callable[..., Any], *arguments: Any) -> tuple[str | None, Any]:
    """(complaint, answer): by value, since Ray wraps exceptions into pages of text."""
    try:
        return None, question(*arguments)
    except UserError as error:
        return str(error), None
