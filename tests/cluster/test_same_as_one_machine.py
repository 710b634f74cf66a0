"""On three hosts every verb comes to what it comes to on one machine: the same tokens, rows and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.pipeline import STAGES, arguments, content, evaluation, make_images, prepare, sweep, write_recipe
from tests.cluster.ray_cluster import Cluster, Driver, here, on_host
from tests.faults.elastic import compare
from tests.faults.processes import wait
from tests.faults.runs import journal

PATIENCE = 420.0


class Pipeline(NamedTuple):
    """A recipe, and the folder of a pipeline that this machine alone has finished."""

    recipe: Path
    alone: Path

    def on_cluster(self, cluster: Cluster, verb: str, run: Path, *settings: str) -> Driver:
        told = arguments(self.recipe, verb, run, *STAGES[verb].settings, *settings)
        return Driver(self.recipe.parent, verb, told, on_host(cluster, cluster.head))

    def on_this_machine(self, verb: str, run: Path, *settings: str) -> None:
        driver = Driver(self.recipe.parent, verb, arguments(self.recipe, verb, run, *settings), here)
        assert driver.finish(PATIENCE) == 0, driver.output


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    make_images(folder)
    found = Pipeline(write_recipe(folder), folder / "alone")
    for verb in ("tokenize", "train"):
        found.on_this_machine(verb, found.alone, "compute.workers=0")
    return found


def finish(driver: Driver) -> None:
    assert driver.finish(PATIENCE) == 0, driver.output


def spread_over(cluster: Cluster, verb: str, driver: Driver) -> list[str]:
    """The hosts on which a command's processes work, once there are two."""
    part = STAGES[verb].worker
    wait(lambda: driver.ended or len(cluster.workers(part)) > 1, 240, 0.1)
    return sorted(cluster.workers(part))


def fresh(pipeline: Pipeline, verb: str, run: Path) -> Path:
    prepare(pipeline.alone, run, STAGES[verb])
    return run


def test_the_same_tokens(cluster: Cluster, pipeline: Pipeline, shared: Path) -> None:
    run = fresh(pipeline, "tokenize", shared / "run")
    driver = pipeline.on_cluster(cluster, "tokenize", run)
    assert len(spread_over(cluster, "tokenize", driver)) > 1
    finish(driver)
    assert content(run) == content(pipeline.alone)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_same_rows_and_losses(cluster: Cluster, pipeline: Pipeline, shared: Path, zero: int) -> None:
    run = fresh(pipeline, "train", shared / "run")
    driver = pipeline.on_cluster(cluster, "train", run, f"train.zero={zero}")
    assert len(spread_over(cluster, "train", driver)) == 2, "two workers on two hosts"
    finish(driver)
    said, near = compare(journal(run), journal(pipeline.alone))
    assert near, said


def test_the_same_evaluation(cluster: Cluster, pipeline: Pipeline, shared: Path) -> None:
    run = fresh(pipeline, "evaluate", shared / "run")
    driver = pipeline.on_cluster(cluster, "evaluate", run)
    assert len(spread_over(cluster, "evaluate", driver)) > 1
    finish(driver)
    pipeline.on_this_machine("evaluate", pipeline.alone, "compute.workers=0")
    assert evaluation(run) == evaluation(pipeline.alone)


def test_the_same_sweep(cluster: Cluster, pipeline: Pipeline, shared: Path) -> None:
    run, alone = (fresh(pipeline, "tune", shared / name) for name in ("run", "alone"))
    driver = pipeline.on_cluster(cluster, "tune", run)
    assert len(spread_over(cluster, "tune", driver)) > 1
    finish(driver)
    pipeline.on_this_machine("tune", alone, *STAGES["tune"].settings)
    found, wanted = sweep(run), sweep(alone)
    assert found["complete"] and [one["state"] for one in found["trials"]] == ["finished"] * len(found["trials"])
    assert differences(found, wanted) == []


def differences(found: Any, wanted: Any, place: str = "") -> list[str]:
    """Where two values of JSON differ."""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        return [line for key in found for line in differences(found[key], wanted[key], f"{place}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [line for k, pair in enumerate(zip(found, wanted, strict=True)) for line in differences(*pair, f"{place}[{k}]")]
    return [] if found == wanted else [f"{place}: {found!r}, alone {wanted!r}"]
