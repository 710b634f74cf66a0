"""Trackers that a recipe may name (`trackers`), each behind the same three words: the last step that it has, `log` and `close`.

    tensorboard  RUN/tensorboard/, written anew from the journal at each start
    mlflow       the server of MLFLOW_TRACKING_URI
    wandb        the server that WANDB_API_KEY opens, or with WANDB_MODE=offline RUN/wandb/, written anew at each start

A run is known by its folder or URI and by what it computes (`identity`), so one that goes on, on whatever machine, goes on in the
same place. Addresses and keys come from the environment, as these programs name them, and never from a recipe.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.errors import UserError
from lvm_ray.storage import is_uri, split_query
from lvm_ray.working_copy import published

PROJECT = "lvm-ray"
IDENTITY = "lvm_ray_run"  # MLflow's tag
PARTS = 3  # of a run's path that its name has: runs/demo/student
LONGEST_PARAMETER, PARAMETERS_AT_ONCE = 500, 100  # MLflow's limits
ODD = re.compile(r"[^\w .-]")  # letters that not every tracker takes in a name
# How long MLflow's client tries before it gives up; by itself it takes half an hour.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class TensorBoard:
    """Event files, which any TensorBoard shows: `tensorboard --logdir RUN`."""

    def __init__(self, recipe: Recipe) -> None:
        from tensorboardX import SummaryWriter

        folder = Path(recipe.run) / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.last = 0
        # The purge is for one that is looking on: it forgets what the old files told it.
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self, done: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment `lvm-ray`, found again by its tag."""

    def __init__(self, recipe: Recipe) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name, own = identity(recipe)
        experiment = self._client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        found = self._client.search_runs([place], f"tags.{IDENTITY} = '{own}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(place, run_name=name, tags={IDENTITY: own}).info.run_id
            self._describe(recipe)
        self.last = max((point.step for point in self._client.get_metric_history(self._run, "loss")), default=0)

    def _describe(self, recipe: Recipe) -> None:
        from mlflow.entities import Param

        values = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in settings(recipe).items()]
        for start in range(0, len(values), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run, params=values[start : start + PARAMETERS_AT_ONCE])

    def log(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, line["step"]) for name, value in numbers(line).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


class WandB:
    """A run of the project `lvm-ray`, of an id of ours."""

    def __init__(self, recipe: Recipe) -> None:
        import wandb

        name, own = identity(recipe)
        for old in (Path(recipe.run) / "wandb").glob(f"offline-run-*-{own}"):
            shutil.rmtree(old)
        quiet = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=PROJECT, id=own, name=name, dir=recipe.run, config=config.to_dict(recipe), resume="allow", settings=quiet
        )
        self.last = max(0, self._run.starting_step - 1)

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(numbers(line), step=line["step"])

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


OPEN: dict[str, Callable[[Recipe], TensorBoard | MLflow | WandB]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def require(recipe: Recipe) -> str:
    """The recipe's trackers, as text. Raises UserError where a package or an address is missing that one of them needs."""
    for name in recipe.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"trackers: {name}: its package is not installed: pip install 'lvm-ray[{name}]', or leave it out")
    if "mlflow" in recipe.trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("trackers: mlflow: no server: set MLFLOW_TRACKING_URI to its address, or leave it out")
    return ", ".join(recipe.trackers)


def identity(recipe: Recipe) -> tuple[str, str]:
    """A run's name, and its id: the same wherever and however often the run goes on, and another one for another recipe there."""
    run = published(recipe).run
    place = run if is_uri(run) else os.path.abspath(run)
    name = "/".join(split_query(place)[0].rstrip("/").split("/")[-PARTS:]).strip("/")
    own = hashlib.sha256(f"{place}\n{config.fingerprint(published(recipe))}".encode()).hexdigest()[:16]
    return name, own


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a journal's line, those in it by their paths: {"loss": 2.1, "target_loss/pose": 1.9}. Without its step."""
    return {path: float(value) for path, value in _flat(line, "/") if path != "step"}


def settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by key path."""
    return dict(_flat(config.to_dict(recipe), "."))


def _flat(values: Mapping[str, Any], separator: str, before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all values in mappings of mappings, but for those that are null."""
    for key, value in values.items():
        path = before + ODD.sub("_", key)
        if isinstance(value, Mapping):
            yield from _flat(value, separator, path + separator)
        elif value is not None:
            yield path, value
