"""Where the workers of a stage run on a cluster: on nodes by their labels and resources, never by their names (`placement`).

    placement:
      tokenize: {labels: {pool: cpu}}
      train: {labels: {ray.io/accelerator-type: [A100, H100]}, resources: {big: 1}}

Nodes get labels and resources where they start: `ray start --labels pool=cpu --resources '{"big": 4}'`. A machine of one's own
leaves nothing to choose, so placement counts only on a cluster that is joined (RAY_ADDRESS). What a stage computes never
depends on it.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from lvm_ray.errors import UserError
from lvm_ray.section import NestedProblem, Section

if TYPE_CHECKING:
    from lvm_ray.config import Recipe

Stage = Literal["tokenize", "cache", "train", "evaluate"]
STAGES: tuple[Stage, ...] = ("tokenize", "cache", "train", "evaluate")

NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # as Kubernetes has it, and Ray after it
LABEL, VALUE = re.compile(rf"([A-Za-z0-9][A-Za-z0-9.-]{{0,252}}/)?{NAME}"), re.compile(rf"!?{NAME}")
OWN_LABEL = "ray.io/node-id"  # of one node alone
OWN_RESOURCE = "node:"  # Ray's, followed by a node's address
COUNTED = {  # resources that recipes have other words for
    "CPU": "each worker takes one",
    "memory": "train.micro_batch and train.zero decide how much a worker needs",
    "object_store_memory": "it is the node's",
}


class PlaceSection(Section):
    """The nodes that may run a stage's workers, and what each worker takes of its node. One that names nothing takes any."""

    labels: dict[str, str | list[str]] = Field(
        {}, description="{label: value}: what a node must have; [one, other]: either of them; !value: not this one"
    )
    resources: dict[str, float] = Field({}, description="{name: amount}: custom resources that each worker takes of its node")

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, found: Any) -> Any:
        for label, wanted in found.items() if isinstance(found, dict) else ():
            if not isinstance(label, str) or not LABEL.fullmatch(label):
                raise ValueError(f"{label!r} is no label: letters, digits, `-`, `_`, `.`, after a prefix with `/` or without")
            if label == OWN_LABEL:
                raise ValueError(f"{label} names a single node: give the nodes that are meant a label of their own")
            values = wanted if isinstance(wanted, list) else [wanted]
            for value in values:
                if not isinstance(value, str) or not VALUE.fullmatch(value) or (isinstance(wanted, list) and value[0] == "!"):
                    raise ValueError(f"{label}: found {value!r}: give a label's value as text, `!value`, or [value, value]")
            if not values:
                raise ValueError(f"{label}: an empty list, which no node has: name a value, or leave it out")
        return found

    @field_validator("resources")
    @classmethod
    def _resources(cls, found: dict[str, float]) -> dict[str, float]:
        for name, amount in found.items():
            if name.startswith(OWN_RESOURCE):
                raise ValueError(f"{name} names a single node: give the nodes that are meant a resource of their own")
            if name in COUNTED:
                raise ValueError(f"{name} is not for recipes to ask for ({COUNTED[name]}): leave it out")
            if not 0 < amount < math.inf or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name}: found {amount:g}: an amount is above 0, and whole where it is above 1")
        return found

    @property
    def chooses(self) -> bool:
        """Whether not every node will do."""
        return bool(self.labels or self.resources)

    @property
    def selector(self) -> dict[str, str]:
        """The labels as Ray's label selector."""
        return {label: f"in({', '.join(value)})" if isinstance(value, list) else value for label, value in self.labels.items()}

    def without_gpu(self) -> PlaceSection:
        """The same nodes, for a worker that computes on CPUs."""
        return self.model_copy(update={"resources": {name: value for name, value in self.resources.items() if name != "GPU"}})


class PlacementSection(Section):
    """Where on a cluster the workers of each stage run; default: anywhere."""

    tokenize: PlaceSection | None = Field(
        None, description="images to tokens, and a tokenizer's training; `resources: {GPU: 0.25}`: tokens are made on GPUs"
    )
    cache: PlaceSection | None = Field(None, description="a teacher's answers")
    train: PlaceSection | None = Field(None, description="trainings, those of trials too")
    evaluate: PlaceSection | None = None
    wait: float = Field(
        0.0,
        ge=0,
        lt=math.inf,
        description="minutes to wait for nodes that the cluster's autoscaler has to start; 0: what is missing is refused at once",
    )

    @model_validator(mode="after")
    def _gpus(self) -> PlacementSection:
        for stage in STAGES:
            place = getattr(self, stage)
            if place and "GPU" in place.resources and stage != "tokenize":
                raise NestedProblem(f"{stage}.resources: GPU is not for this stage to ask for: set compute.device to cuda")
        return self


def place_of(recipe: Recipe, stage: Stage) -> PlaceSection:
    """Where a stage's workers run: as the recipe says on a cluster that is joined, anywhere on a machine of one's own."""
    from lvm_ray.ray_session import joined

    place = getattr(recipe.placement, stage) if recipe.placement and joined() else None
    return place or PlaceSection()


def options(place: PlaceSection) -> dict[str, Any]:
    """What tasks and actors of Ray, and `map_batches`, take to run at a place."""
    gpus = place.resources.get("GPU")
    resources = place.without_gpu().resources
    return {
        **({"label_selector": place.selector} if place.labels else {}),
        **({"resources": resources} if resources else {}),
        **({"num_gpus": gpus} if gpus else {}),
    }


def share(place: PlaceSection, gpu: bool = False) -> dict[str, float]:
    """What a worker takes of its node, by Ray's names."""
    return {"CPU": 1.0, **({"GPU": 1.0} if gpu else {}), **place.resources}


def nodes_of(place: PlaceSection) -> list[dict[str, Any]]:
    """The living nodes of the cluster that have a place's labels, as `ray.nodes()` describes them."""
    from lvm_ray.train.nodes import living_nodes

    return [node for node in living_nodes() if has_labels(node.get("Labels") or {}, place.labels)]


def has_labels(found: Mapping[str, str], wanted: Mapping[str, str | list[str]]) -> bool:
    """Whether a node with these labels may be taken."""

    def fits(label: str, value: str | list[str]) -> bool:
        if isinstance(value, list):
            return found.get(label) in value
        return found.get(label) != value[1:] if value.startswith("!") else found.get(label) == value

    return all(fits(label, value) for label, value in wanted.items())


def room(nodes: Sequence[Mapping[str, Any]], each: Mapping[str, float]) -> int:
    """How many workers that take so much each these nodes have room for, when they are empty."""
    return sum(min(int(node["Resources"].get(name, 0) / amount + 1e-9) for name, amount in each.items()) for node in nodes)


def gpus_of(nodes: Sequence[Mapping[str, Any]]) -> int:
    """The GPUs of some nodes."""
    return int(sum(node["Resources"].get("GPU", 0) for node in nodes))


def require(recipe: Recipe, stage: Stage, workers: int, gpu: bool = False, least: int | None = None) -> list[dict[str, Any]]:
    """The nodes that may run a stage's workers, once there is room for so many of them. Ray runs.

    Where there is not, waits as long as `placement.wait` says for an autoscaler to start more. Raises UserError, which says what
    nodes there are, where the recipe chooses and there is still no room for the `least` number of workers; default: all.
    """
    least = workers if least is None else least
    place = place_of(recipe, stage)
    each, nodes = share(place, gpu), nodes_of(place)
    wait = recipe.placement.wait if recipe.placement else 0.0
    if wait and _lacks(nodes, each, workers):
        _await(place, each, workers, 60 * wait)
        nodes = nodes_of(place)
    found = room(nodes, each)
    if not place.chooses or found >= least:
        return nodes
    wanted = " and ".join([*_label_words(place), *(f"{amount:g} {name}" for name, amount in each.items() if name != "CPU")])
    problem = (
        f"the nodes with {wanted} have room for {found} of {least} workers" if found else f"no node of the cluster has {wanted}"
    )
    raise UserError(
        f"placement.{stage}: {problem}: there {'is' if len(all_nodes := nodes_of(PlaceSection())) == 1 else 'are'} "
        f"{inventory(all_nodes)}: start such nodes (ray start --labels, --resources), or change it"
    )


def check(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises UserError where no node can run a worker of one of these stages, so that none begins before that is known.

    Nodes that the recipe is ready to wait for are not asked for before their stage begins.
    """
    if not recipe.compute.most_workers or (recipe.placement and recipe.placement.wait):
        return
    for stage in stages:
        if place_of(recipe, stage).chooses:
            from lvm_ray import ray_session

            ray_session.start(recipe)
            require(recipe, stage, 1)


def at_once(recipe: Recipe) -> Recipe:
    """The recipe without patience, for what must start no nodes."""
    if recipe.placement is None:
        return recipe
    return recipe.model_copy(update={"placement": recipe.placement.model_copy(update={"wait": 0.0})})


def inventory(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Nodes for people: `2 nodes with pool=cpu (4 CPU, 1 big), 1 node without labels (8 CPU)`."""
    kinds = Counter(map(_node_words, nodes))
    return ", ".join(f"{count} {'node' if count == 1 else 'nodes'} {words}" for words, count in kinds.items()) or "none"


def _node_words(node: Mapping[str, Any]) -> str:
    labels = [f"{label}={value}" for label, value in sorted((node.get("Labels") or {}).items()) if label != OWN_LABEL]
    hidden = (OWN_RESOURCE, "memory", "object_store_memory", "accelerator_type:")
    amounts = [f"{amount:g} {name}" for name, amount in sorted(node["Resources"].items()) if not name.startswith(hidden)]
    return f"{'with ' + ' and '.join(labels) if labels else 'without labels'} ({', '.join(amounts)})"


def _label_words(place: PlaceSection) -> list[str]:
    return [f"{label}={' or '.join(value) if isinstance(value, list) else value}" for label, value in place.labels.items()]


def _lacks(nodes: Sequence[Mapping[str, Any]], each: Mapping[str, float], workers: int) -> bool:
    """Whether there is no room for workers on their nodes, or none beside them for Ray Data's own tasks."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    return room(nodes, each) < workers or int(cpus) <= workers


def _await(place: PlaceSection, each: Mapping[str, float], workers: int, seconds: float) -> None:
    """Have the autoscaler start nodes for workers, and a CPU more for the data, and wait until they are there."""
    from ray.util import placement_group, remove_placement_group

    from lvm_ray.progress import duration, say

    say(f"waiting up to {duration(seconds)} for nodes with room for {workers} {'worker' if workers == 1 else 'workers'}")
    bundles, selectors = [*[dict(each)] * workers, {"CPU": 1.0}], [*[place.selector] * workers, {}]
    group = placement_group(bundles, bundle_label_selector=selectors if place.labels else None)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not group.wait(1):  # not all at once, so that Ctrl-C is heard
            pass
    finally:
        remove_placement_group(group)
