"""Where stages run: what a recipe may ask for, which nodes have it, and on a cluster of labelled nodes, where they really ran."""

import os
import threading
import time
from pathlib import Path

import pytest

import lvm_ray.tokenizer
from lvm_ray import config, pipeline, placement, ray_session
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.placement import PlaceSection
from lvm_ray.progress import Bar
from lvm_ray.train import caching, launch, nodes, preflight
from lvm_ray.train.job import absolute, resolve
from lvm_ray.tune import running
from lvm_ray.tune.trial import Work

from .nodes import on_nodes
from .test_evaluate import contents, evaluate, make_pipeline
from .toys import journal, load_toy_tokenizer, toy_recipe

DEMO = str(Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml")


# What a recipe may ask for


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("placement.trian={}", "placement.trian: no such key; did you mean 'train'?"),
        ("placement.train.label={}", "placement.train.label: no such key; did you mean 'labels'?"),
        ("placement.train={labels: {pool: true}}", "placement.train.labels: pool: found True: give a label's value as text"),
        ("placement.train={labels: {pool: 'in(a, b)'}}", "placement.train.labels: pool: found 'in(a, b)'"),
        ("placement.train={labels: {pool: []}}", "placement.train.labels: pool: an empty list"),
        ("placement.train={labels: {pool: ['!a', b]}}", "placement.train.labels: pool: found '!a'"),
        ("placement.train={labels: {a b: x}}", "placement.train.labels: 'a b' is no label"),
        ("placement.train={labels: {ray.io/node-id: abc}}", "placement.train.labels: ray.io/node-id names a single node"),
        ("placement.train={resources: {'node:10.0.0.1': 1}}", "placement.train.resources: node:10.0.0.1 names a single node"),
        ("placement.train={resources: {big: 0}}", "placement.train.resources: big: found 0: an amount is above 0"),
        ("placement.train={resources: {big: -1}}", "placement.train.resources: big: found -1"),
        ("placement.train={resources: {big: 1.5}}", "placement.train.resources: big: found 1.5: an amount is above 0, and whole"),
        ("placement.train={resources: {big: .inf}}", "placement.train.resources: big: found inf"),
        ("placement.train={resources: {CPU: 2}}", "placement.train.resources: CPU is not for recipes to ask for"),
        ("placement.train={resources: {GPU: 1}}", "placement.train.resources: GPU is not for this stage to ask for"),
        ("placement.wait=-1", "placement.wait: found -1"),
    ],
)
def test_what_no_node_can_be_chosen_by_is_refused(setting, message):
    with pytest.raises(UserError) as refused:
        config.load(DEMO, [setting])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_placement_is_kept_in_the_recipe_and_changes_nothing_that_is_computed(tmp_path):
    settings = [
        "placement.train={labels: {ray.io/accelerator-type: [A100, H100], spot: '!yes'}, resources: {big: 0.5}}",
        "placement.tokenize={labels: {pool: cpu}, resources: {GPU: 0.25}}",
        "placement.wait=10",
    ]
    recipe, plain = config.load(DEMO, settings), config.load(DEMO)
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    assert config.load(str(tmp_path / "config.yaml")) == recipe != plain
    assert config.fingerprint(recipe) == config.fingerprint(plain)
    assert recipe.placement is not None and recipe.placement.train is not None and recipe.placement.tokenize is not None
    train, tokens = recipe.placement.train, recipe.placement.tokenize
    assert placement.options(train) == {
        "label_selector": {"ray.io/accelerator-type": "in(A100, H100)", "spot": "!yes"},
        "resources": {"big": 0.5},
    }
    assert placement.options(tokens) == {"label_selector": {"pool": "cpu"}, "num_gpus": 0.25}
    assert placement.share(tokens) == {"CPU": 1, "GPU": 0.25} and placement.share(tokens.without_gpu()) == {"CPU": 1}
    assert placement.options(PlaceSection()) == {} and not PlaceSection().chooses and train.chooses


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        ({}, {}, True),
        ({"pool": "gpu"}, {"pool": "gpu", "zone": "a"}, True),
        ({"pool": "gpu"}, {"pool": "cpu"}, False),
        ({"pool": "gpu"}, {}, False),
        ({"pool": ["gpu", "big"]}, {"pool": "big"}, True),
        ({"pool": ["gpu", "big"]}, {"pool": "cpu"}, False),
        ({"spot": "!yes"}, {"spot": "no"}, True),
        ({"spot": "!yes"}, {}, True),
        ({"spot": "!yes"}, {"spot": "yes"}, False),
        ({"pool": "gpu", "spot": "!yes"}, {"pool": "gpu", "spot": "yes"}, False),
    ],
)
def test_a_node_is_taken_for_all_of_its_labels(wanted, found, fits):
    assert placement.has_labels(found, wanted) is fits


def test_room_is_counted_node_by_node():
    some = [{"Resources": {"CPU": 4, "big": 1}}, {"Resources": {"CPU": 3, "big": 0.3}}, {"Resources": {"CPU": 8}}]
    assert placement.room(some, {"CPU": 1}) == 15
    assert placement.room(some, {"CPU": 1, "big": 0.1}) == 4 + 3
    assert placement.room(some, {"CPU": 2, "big": 1}) == 1
    assert placement.room([], {"CPU": 1}) == 0


def test_nodes_are_told_by_what_they_have():
    node = {
        "Labels": {"pool": "cpu", "ray.io/node-id": "abc"},
        "Resources": {"CPU": 4.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "big": 2.0},
    }
    other = {"Labels": {}, "Resources": {"CPU": 8.0}}
    assert placement.inventory([node, other, node]) == "2 nodes with pool=cpu (4 CPU, 2 big), 1 node without labels (8 CPU)"


def test_a_machine_of_ones_own_has_nothing_to_choose(tmp_path, monkeypatch):
    recipe = toy_recipe(tmp_path, placement={"train": {"labels": {"pool": "gpu"}}})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert placement.place_of(recipe, "train") == PlaceSection()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert placement.place_of(recipe, "train").labels == {"pool": "gpu"}
    assert placement.place_of(recipe, "evaluate") == PlaceSection()


def test_gpus_count_where_the_stage_runs(tmp_path, monkeypatch):
    """A device is decided by the nodes that a stage may use, and not by others of the cluster."""
    some = [
        {"Labels": {"pool": "gpu"}, "Resources": {"CPU": 4, "GPU": 2}},
        {"Labels": {"pool": "cpu"}, "Resources": {"CPU": 4}},
    ]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_session, "start", lambda workers: None)
    monkeypatch.setattr(nodes, "living_nodes", lambda: some)
    places = {"train": {"labels": {"pool": "gpu"}}, "evaluate": {"labels": {"pool": "cpu"}}}
    recipe = toy_recipe(tmp_path, placement=places, compute={"workers": 1})
    assert [resolve(recipe, stage).compute.device for stage in ("train", "evaluate", "cache")] == ["cuda", "cpu", "cuda"]


def test_a_gpu_that_is_not_there_is_said_in_one_line(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^placement\.tokenize: GPU is asked for, and torch finds none on node "):
        lvm_ray.tokenizer.on_gpu(load_toy_tokenizer(""))


# On a cluster: a head, a node with the label pool=cpu, one with pool=gpu and four of the resource big

LABELLED = [
    {"labels": {"pool": "cpu"}, "num_cpus": 3},
    {"labels": {"pool": "gpu", "spot": "yes"}, "resources": {"big": 4}, "num_cpus": 3},
]
PLACES = {
    "tokenize": {"labels": {"pool": "cpu"}},
    "train": {"labels": {"pool": ["gpu", "none"]}, "resources": {"big": 2}},
    "cache": {"resources": {"big": 1}},
    "evaluate": {"labels": {"pool": "!cpu"}},
}


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture(scope="module")
def cluster():
    with on_nodes(LABELLED) as found:
        yield found


def bar():
    return Bar("stage", None, "")


def ran(kind):
    """The pools of the nodes on which actors of a class ran, each as often as they did."""
    import ray
    from ray._private.state import actors

    pools = {node["NodeID"]: node["Labels"].get("pool", "head") for node in ray.nodes()}
    return sorted(pools[actor["Address"]["NodeID"]] for actor in actors().values() if kind in actor["ActorClassName"])


def tokenized_there(recipe):
    return tokenize(recipe, bar(), load_toy_tokenizer).files, ran("UnitTokenizer")


def trained_there(recipe):
    lvm_ray.tokenizer.load_tokenizer = load_toy_tokenizer
    return journal(launch.train(recipe, bar())), ran("RayTrainWorker")


def cached_there(recipe):
    lvm_ray.tokenizer.load_tokenizer = load_toy_tokenizer
    return caching.cache(resolve(recipe, "cache"), "teacher", bar()), ran("Answers")


def evaluated_there(runs, recipe):
    evaluate(runs, recipe)
    return ran("Scorer")


def tried_there(recipe, sweep):
    """Why a trial failed, which the toys have no tokenizer for, and where it was."""
    recipe = resolve(recipe)
    room = running.room_for(recipe, 1, 1, False)
    recipe = absolute(recipe.model_copy(update={"compute": room.compute(recipe.compute)}))
    os.makedirs(recipe.run)
    running.run_trials({0: Work(recipe)}, room, sweep, "target_perplexity", "invert", None, lambda number, begins: None)
    return Path(recipe.run, "failed.json").read_text(), ran("ImplicitFunc")


def refused_there(check, *arguments):
    """(the message, seconds) of a check that must fail."""
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        check(*arguments)
    return str(refused.value), time.monotonic() - started


def test_tokens_are_made_where_the_recipe_says_and_are_the_same(tmp_path, cluster):
    tasks = {"invert": {"train": 520}, "swap": {"copies": 2}}
    here = tokenize(toy_recipe(tmp_path / "here", tasks=tasks), bar(), load_toy_tokenizer)
    recipe = toy_recipe(tmp_path / "there", tasks=tasks, compute={"workers": 2}, placement=PLACES)
    files, pools = cluster.run(tokenized_there, recipe)
    assert files == here.files
    assert pools == ["cpu", "cpu"]


def test_a_training_runs_where_the_recipe_says_and_reaches_the_same_losses(tmp_path, shards, cluster):
    """With a profile, which the first worker writes wherever it is."""
    alone = launch.train(toy_recipe(tmp_path / "here", shards=shards), bar())
    compute = {"workers": 1, "profile": True}
    recipe = toy_recipe(tmp_path / "there", shards=shards, compute=compute, placement=PLACES)
    lines, pools = cluster.run(trained_there, recipe)
    assert pools == ["gpu"]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in journal(alone)], rel=1e-5)
    assert "aten::" in (tmp_path / "there/profile/operations.txt").read_text()
    assert placement.PlacementSection.model_validate(PLACES) == config.load(f"{recipe.run}/config.yaml").placement


def test_answers_are_kept_where_the_recipe_says_and_are_the_same(tmp_path, shards, cluster):
    teacher = launch.train(toy_recipe(tmp_path / "teacher", shards=shards, train={"steps": 30, "rate": 1e-2}), bar())

    def student(name, **changes):
        distill = {"teacher": str(teacher), "cache": str(tmp_path / name / "answers")}
        return toy_recipe(tmp_path / name, shards=shards, distill=distill, **changes)

    here = caching.cache(resolve(student("here")), "teacher", bar())
    facts, pools = cluster.run(cached_there, student("there", compute={"workers": 1}, placement=PLACES))
    assert pools == ["gpu"] and facts == here
    parts = [sorted((tmp_path / name / "answers").glob("part-*")) for name in ("here", "there")]
    assert [path.read_bytes() for path in parts[0]] == [path.read_bytes() for path in parts[1]] != []


def test_scores_are_made_where_the_recipe_says_and_are_the_same(tmp_path, cluster):
    recipe, runs = make_pipeline(tmp_path / "here")
    evaluate(runs, recipe)
    there, others = make_pipeline(tmp_path / "there", compute={"workers": 1}, placement=PLACES)
    assert cluster.run(evaluated_there, others, there) == ["gpu"]
    assert contents(runs) == contents(others)


def test_a_trial_runs_where_trainings_do(tmp_path, shards, cluster):
    recipe = toy_recipe(tmp_path / "trials/00000", shards=shards, compute={"workers": 1}, placement=PLACES)
    reason, pools = cluster.run(tried_there, recipe, str(tmp_path))
    assert "no tokenizer here" in reason and pools == ["gpu"]


@pytest.mark.parametrize(
    ("place", "workers", "words"),
    [
        ({"labels": {"pool": "tpu"}}, 1, "no node of the cluster has pool=tpu: there are "),
        ({"labels": {"pool": "cpu"}, "resources": {"big": 1}}, 1, "no node of the cluster has pool=cpu and 1 big: there are "),
        ({"labels": {"pool": ["gpu", "tpu"]}}, 4, "the nodes with pool=gpu or tpu have room for 3 of 4 workers: there are "),
        ({"resources": {"big": 3}}, 2, "the nodes with 3 big have room for 1 of 2 workers: there are "),
    ],
)
def test_a_training_without_nodes_is_refused_with_what_there_is(tmp_path, cluster, place, workers, words):
    recipe = toy_recipe(tmp_path, placement={"train": place}, compute={"workers": workers})
    message, _ = cluster.run(refused_there, preflight.check_cluster, recipe)
    assert message.startswith(f"placement.train: {words}") and "\n" not in message
    assert "1 node with pool=cpu (3 CPU)" in message and "1 node with pool=gpu and spot=yes (3 CPU, 4 big)" in message
    assert message.endswith("start such nodes (ray start --labels, --resources), or change it")


@pytest.mark.parametrize("stage", placement.STAGES)
def test_no_verb_begins_before_its_nodes_are_there(tmp_path, cluster, stage):
    recipe = toy_recipe(tmp_path, placement={stage: {"labels": {"pool": "tpu"}}, "wait": 5}, compute={"workers": 1})
    message, seconds = cluster.run(refused_there, pipeline.dry_run, recipe, False, None, False, [stage])
    assert message.startswith(f"placement.{stage}: no node of the cluster has pool=tpu"), "and a dry run starts no nodes"
    assert seconds < 60 and not (tmp_path / "data").exists()


def test_a_training_waits_for_nodes_that_are_still_to_come(tmp_path, cluster):
    def recipe(pool, wait):
        return toy_recipe(tmp_path, placement={"train": {"labels": {"pool": pool}}, "wait": wait}, compute={"workers": 1})

    message, seconds = cluster.run(refused_there, preflight.check_cluster, recipe("late", 0.05))
    assert "no node of the cluster has pool=late" in message and 3 <= seconds < 30
    threading.Timer(3, cluster.add, [{"labels": {"pool": "late"}, "num_cpus": 1}]).start()
    assert cluster.run(preflight.check_cluster, recipe("late", 2)).endswith("on 1 of its nodes")
