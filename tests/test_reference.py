"""Reference networks: shapes, learning, reading joints, the budget, the pairs they learn from, their file, and their study."""

import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from lvm_ray import config
from lvm_ray.config import Recipe
from lvm_ray.data import synthetic
from lvm_ray.data.plan import make_plan
from lvm_ray.data.sentences import sentences
from lvm_ray.data.shards import open_shards
from lvm_ray.data.tokenize import tokenize
from lvm_ray.errors import UserError
from lvm_ray.progress import Bar
from lvm_ray.reference.heads import Classes, Head, Joints, Picture, head_of, read_joints
from lvm_ray.reference.networks import UNet
from lvm_ray.reference.run import score_reference, write_references
from lvm_ray.reference.train import Views, drawn_on, fit, make_views, pixels_of, rate_part
from lvm_ray.tasks.base import PairTask, Sample
from lvm_ray.tasks.derain import Derain
from lvm_ray.tasks.pose import Pose
from lvm_ray.tasks.quality import psnr_y
from lvm_ray.tasks.segmentation import Segmentation
from tests.studies import references
from tests.test_tasks import pose_sample
from tests.toys import load_toy_tokenizer, toy_recipe

SIZE = 64
SEGMENTATION = Segmentation(classes=list(synthetic.CLASSES))


def views_of(head: Head, samples: list[Sample]) -> Views:
    targets = np.stack([head.target(sample, SIZE) for sample in samples])
    return Views(np.stack([sample.image for sample in samples]), targets, len(samples))


def answers(task: PairTask, head: Head, network: UNet, samples: list[Sample]) -> list[dict]:
    """Measures of the samples, each of which is its own view."""
    found = []
    with torch.inference_mode():
        for sample in samples:
            pixels = pixels_of(sample.image[None])
            found.append(task.measure(head.answer(network(pixels), pixels, task.questions(sample, SIZE), sample), sample))
    return found


@pytest.mark.parametrize("size", [16, 63, 64, 88])
def test_a_network_answers_with_maps_of_the_pictures_size_whatever_it_is(size: int) -> None:
    network = UNet(5, width=8)
    pixels = torch.rand(2, 3, size, size) * 2 - 1
    assert network(pixels).shape == (2, 5, size, size)
    assert not network(pixels).any()  # an answer starts as nothing: of restoration, as the image itself
    torch.nn.init.normal_(network.head.weight)
    assert not torch.equal(network(pixels), network(pixels.flip(-1)))


def test_every_task_of_pairs_has_a_head() -> None:
    several = {"images": "i", "annotations": "a.json", "people": "all"}
    assert isinstance(head_of(SEGMENTATION), Classes) and head_of(SEGMENTATION).channels == 4
    assert isinstance(head_of(Pose()), Joints)
    assert isinstance(head_of(Pose.model_validate({"train": several})), Picture)  # several people are drawn and read back
    assert isinstance(head_of(Derain()), Picture)
    assert head_of(Segmentation(classes=["a", "b"], background=False)).channels == 2


def test_a_network_learns_eight_scenes_by_heart() -> None:
    samples = [Sample(*synthetic.scene(np.random.default_rng(seed), SIZE)) for seed in range(8)]
    head = head_of(SEGMENTATION)
    trained = fit(head, views_of(head, samples), seconds=8, rate=1e-2, seed=0)
    score = SEGMENTATION.score(answers(SEGMENTATION, head, trained.network, samples))["miou"]
    majority = next(one for one in SEGMENTATION.trivial_answers(samples, SIZE) if one.name == "majority")
    floor = SEGMENTATION.score([SEGMENTATION.measure(majority.answer(sample), sample) for sample in samples])["miou"]
    assert score > floor + 0.4, (score, floor)


def test_a_network_takes_rain_off_pictures_that_it_has_learnt() -> None:
    samples = [Sample(*synthetic.rain_pair(np.random.default_rng(seed), SIZE)) for seed in range(8)]
    head, task = head_of(Derain()), Derain()
    trained = fit(head, views_of(head, samples), seconds=6, rate=3e-3, seed=0)
    found = np.mean([measure["psnr_y"] for measure in answers(task, head, trained.network, samples)])
    assert found > np.mean([psnr_y(sample.image, sample.label) for sample in samples]) + 3


def test_losses_are_those_of_their_formulas() -> None:
    rng, size = np.random.default_rng(0), 6
    pixels = torch.zeros(2, 3, size, size)
    # Classes: the mean over pixels that have one.
    head = Classes(Segmentation(classes=["a", "b"], ignore=9))
    maps, mask = rng.normal(size=(2, 3, size, size)), rng.choice([0, 1, 2, 9], (2, size, size)).astype(np.uint8)
    places = [(b, y, x) for b, y, x in np.ndindex(mask.shape) if mask[b, y, x] != 9]
    losses = [np.log(np.exp(maps[b, :, y, x]).sum()) - maps[b, mask[b, y, x], y, x] for b, y, x in places]
    assert head.loss(torch.from_numpy(maps), pixels, torch.from_numpy(mask)).item() == pytest.approx(np.mean(losses))
    # Nobody has a class: no loss, and no division by nothing.
    assert head.loss(torch.from_numpy(maps), pixels, torch.full((2, size, size), 9, dtype=torch.uint8)).item() == 0
    # Joints: the cross-entropy of a joint's Gaussian, over labelled joints alone.
    maps, targets = rng.normal(size=(1, 17, size, size)), np.zeros((1, 17, 3), np.float32)
    targets[0, 3], targets[0, 5] = (2.25, 4.5, 1), (1, 1, 0)
    centres = np.arange(size) + 0.5
    wanted = np.exp(-((centres - 2.25) ** 2 + (centres[:, None] - 4.5) ** 2) / 2 / (size / 32) ** 2)
    wanted /= wanted.sum()
    logs = maps[0, 3] - np.log(np.exp(maps[0, 3]).sum())
    loss = Joints().loss(torch.from_numpy(maps).float(), pixels, torch.from_numpy(targets))
    assert loss.item() == pytest.approx(-(wanted * logs).sum(), rel=1e-4)
    # Pictures: the logarithm of each picture's mean squared error.
    maps, truth = rng.normal(size=(2, 3, size, size)), rng.integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    errors = ((0.5 + maps - truth.transpose(0, 3, 1, 2) / 255) ** 2).mean(axis=(1, 2, 3)) + 1e-5
    loss = Picture(Derain()).loss(torch.from_numpy(maps), pixels, torch.from_numpy(truth))
    assert loss.item() == pytest.approx(np.log(errors).mean(), rel=1e-5)


def test_joints_are_read_within_half_a_pixel() -> None:
    rng = np.random.default_rng(0)
    places = rng.uniform(5, SIZE - 5, (17, 2))
    centres = np.arange(SIZE) + 0.5
    maps = np.stack([-((centres[None] - x) ** 2 + (centres[:, None] - y) ** 2) / 2 / 2.0**2 for x, y in places])
    found = read_joints(torch.from_numpy(maps))
    assert [joint.kind for joint in found] == list(range(17))
    assert np.abs(np.array([(joint.x, joint.y) for joint in found]) - places).max() < 0.5
    assert all(joint.confidence > 0.5 for joint in found)
    unsure = read_joints(torch.zeros(17, SIZE, SIZE))  # nothing learnt: anywhere, and sure of nothing
    assert max(joint.confidence for joint in unsure) < 0.05


@pytest.mark.parametrize("crop", [None, 1.15])
def test_heatmaps_of_the_truth_are_answered_as_the_true_person(crop: float | None) -> None:
    """Through the target that is learnt, maps that would have no loss, and back into the image's own pixels."""
    task, head = Pose(crop=crop), Joints()
    centres = np.arange(SIZE) + 0.5
    for seed in range(10):
        sample = pose_sample(seed)
        seen, view = task.version(sample, 0, (0,), SIZE)
        target = head.target(seen, SIZE)
        maps = np.stack([-((centres[None] - x) ** 2 + (centres[:, None] - y) ** 2) / 2 / 2.0**2 for x, y, _ in target])
        answer = head.answer(torch.from_numpy(maps)[None], torch.zeros(1, 3, SIZE, SIZE), [view], sample)
        truth, found = sample.label.array(), answer.array()
        labelled = truth[:, 2] > 0
        away = np.linalg.norm(found[labelled, :2] - truth[labelled, :2], axis=1) * SIZE / (view.box[2] - view.box[0])
        assert away.max() < 0.5 and (found[labelled, 2] > 0).all()
        assert 0 < answer.score <= 1


def test_a_budget_of_core_seconds_is_kept_and_the_rate_falls_over_it() -> None:
    samples = [Sample(*synthetic.scene(np.random.default_rng(seed), SIZE)) for seed in range(4)]
    head = head_of(SEGMENTATION)
    heard: list[float] = []
    began = time.process_time()
    trained = fit(head, views_of(head, samples), seconds=1.5, rate=1e-3, seed=0, report=heard.append)
    taken = time.process_time() - began
    step = max(np.diff([0.0, *heard]))
    assert 1.5 <= trained.seconds <= 1.5 + step + 0.01 and trained.seconds <= taken < trained.seconds + 0.5
    assert trained.steps == len(heard) and heard[-1] == trained.seconds and heard == sorted(heard)
    rates = [rate_part(part) for part in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < 0.2 and max(rates) > 0.98 and rates[-1] < 1e-9 and rates[10:] == sorted(rates[10:], reverse=True)


def test_other_seeds_start_from_other_networks() -> None:
    head = head_of(SEGMENTATION)
    views = views_of(head, [Sample(*synthetic.scene(np.random.default_rng(0), SIZE))])
    first, same, other = (fit(head, views, 1e-9, 1e-3, seed).network.stem[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = toy_recipe(tmp_path_factory.mktemp("reference"), evaluate={"resamples": 100})
    tokenize(recipe, Bar("tokenize", None, ""), load_toy_tokenizer)
    return recipe


@pytest.mark.parametrize("ratio", [0.34, 1, 1.5, 2, 3])
def test_the_pairs_and_copies_are_those_that_the_plan_shows(toys: Recipe, ratio: float) -> None:
    section = toys.balance.model_copy(update={"ratios": {"threshold": ratio}})
    recipe = toys.model_copy(update={"balance": section})
    shards = open_shards(recipe.shard_folder)
    steps = recipe.train.model_copy(update={"steps": 40})  # long enough for every sentence to come
    plan = make_plan(shards.manifest, recipe.model_copy(update={"train": steps}))
    ids, originals = shards.rows("train", "threshold", 0)[0], shards.originals("train", "threshold")
    shown, rows = set(), plan.columns
    named = np.stack([rows.copy, rows.grouping, rows.index], axis=1)[rows.task == plan.tasks.index("threshold")]
    for copy, grouping, index in np.unique(named, axis=0).tolist():
        members = sentences(len(ids), 4, recipe.seed, "threshold", copy, grouping, originals)
        shown |= {(ids[place], copy) for place in members[index].tolist()}
    found = {(name, copy) for name, copies in drawn_on(recipe, shards, "threshold").items() for copy in range(copies)}
    assert found == shown


def test_views_are_those_of_the_shards(toys: Recipe) -> None:
    """Turned into tokens, they are the shards' tokens."""
    shards, task = open_shards(toys.shard_folder), toys.tasks["swap"]
    assert isinstance(task, PairTask)
    views = make_views(toys, "swap", head_of(task), drawn_on(toys, shards, "swap"))
    tokenizer = load_toy_tokenizer("")
    assert views.pairs == 8 and len(views.pictures) == 16
    ids = shards.rows("train", "swap", 0)[0]
    wanted = {name: [shards.rows("train", "swap", copy)[1][place] for copy in (0, 1)] for place, name in enumerate(ids)}
    order = [(item.id, copy) for item in task.items("train") for copy in (0, 1)]
    for place, (name, copy) in enumerate(order):
        shown = np.stack([views.pictures[place], views.targets[place]])
        assert np.array_equal(tokenizer.encode(shown).reshape(-1), wanted[name][copy])


def test_where_views_are_too_many_copies_go_first_then_pairs(toys: Recipe) -> None:
    task = toys.tasks["threshold"]
    assert isinstance(task, PairTask)
    copies = {item.id: 3 for item in task.items("train")}
    one = 6 * toys.size**2
    for room, views, pairs in ((24, 24, 8), (23, 16, 8), (8, 8, 8), (5, 5, 5), (0, 1, 1)):
        made = make_views(toys, "threshold", head_of(task), copies, most_bytes=room * one)
        assert (len(made.pictures), made.pairs) == (views, pairs)


def test_a_file_of_references_stands_beside_the_scores_and_is_made_once(toys: Recipe, tmp_path: Path) -> None:
    bar = Bar("reference", None, "")
    found = write_references(str(tmp_path), toys, 1 / 60, bar)
    content = json.loads((tmp_path / "references.json").read_text())
    assert content.keys() == {*toys.tasks, "how", "key"} and content["how"].keys() == {*toys.tasks}
    for task in toys.tasks:
        entry = content[task]["error"]
        low, high = entry["ci95"]
        assert entry.keys() == {"value", "ci95", "n"} and low <= entry["value"] <= high and entry["n"] == 4
        assert "views of" in content["how"][task] and "core-seconds" in content["how"][task]
    assert bar.done == pytest.approx(1, abs=0.5)
    before = (tmp_path / "references.json").stat().st_mtime_ns
    assert write_references(str(tmp_path), toys, 1 / 60, bar) == content
    assert (tmp_path / "references.json").stat().st_mtime_ns == before
    assert found["key"] != write_references(str(tmp_path), toys, 2 / 60, bar)["key"]  # other minutes, other networks


def test_what_is_scored_is_what_models_are_asked(toys: Recipe) -> None:
    """A network that copies the image, against the same by hand."""
    task = toys.tasks["invert"]
    assert isinstance(task, PairTask)
    items = list(task.items("test"))
    found = score_reference(toys, "invert", head_of(task), UNet(3, width=8), items, "test")
    samples = [task.load(item, "test") for item in items]
    errors = [np.abs(sample.image.astype(float) - sample.label).mean() for sample in samples]
    assert found["error"]["value"] == pytest.approx(np.mean(errors)) and found["error"]["n"] == len(items)


def test_the_study_gives_both_as_many_trials_and_sums_up_what_it_has(tmp_path: Path) -> None:
    listed = list(references.recipes(tmp_path))
    assert len({(config.fingerprint(recipe), recipe.seed) for _, recipe in listed}) == len(listed) == 3 + 3 * 4
    for label, recipe in listed:  # what is chosen by trials is chosen without a look at test scenes
        trial = label.startswith("rates")
        assert trial == (recipe.seed not in references.SEEDS)
        assert trial == all(task.model_dump()["test"] == task.model_dump()["validation"] for task in recipe.tasks.values())
    assert references.table([]) == "" and references.best([]) == {}
    ET.fromstring(references.picture([]))

    def row(label: str, recipe: Recipe, ours: float, devoted: float) -> dict:
        scores = {
            task: {metric: {"value": ours, "floor": 0.0, "ceiling": 1.0, "n": 64}} for task, metric in references.scenes.METRICS
        }
        found = {task: {"scores": {metric: {"value": devoted}}} for task, metric in references.scenes.METRICS}
        loss = {task: 1 - ours for task in scores}
        return {"label": label, "seed": recipe.seed, "tasks": scores, "references": found, "validation": loss}

    tuned = {0.5: (0.3, 0.9), 1.0: (0.2, 0.8), 2.0: (0.4, 0.7)}
    rows = [row(label, recipe, *tuned[factor]) for factor, (label, recipe) in zip(references.FACTORS, listed[:3], strict=True)]
    assert references.best(rows) == {references.OURS: 2.0, **dict.fromkeys(("segmentation", "pose", "derain"), 0.5)}
    rows += [row(label, recipe, 0.5 + recipe.seed / 1000, 0.75) for label, recipe in listed[3:]]
    table = references.table(rows)
    assert "| pose pck | 150 | 3 | 0.000 | 1.000 | 0.572 [0.570, 0.574] | 0.750 [0.750, 0.750] |" in table
    assert "| x 2 | devoted network |  | 0.700 | 0.700 | 0.70 |" in table
    picture = ET.fromstring(references.picture(rows))
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 2 * 3  # two curves a task


def test_minutes_are_checked() -> None:
    with pytest.raises(UserError, match=r"evaluate\.reference_minutes: found 0"):
        config.load("recipes/demo.yaml", ["evaluate.reference_minutes=0"])
