"""Recipes: strict, with errors that name the key and the way out; the resolved one is the same recipe again."""

from pathlib import Path

import pytest

from lvm_ray import cli, config
from lvm_ray.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DEMO = str(RECIPES / "demo.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_its_dump_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = config.load(str(path))
    for derived in (recipe, *([config.teacher_recipe(recipe), config.student_recipe(recipe)] if recipe.teacher else [])):
        (tmp_path / "config.yaml").write_text(config.dump(derived))
        assert config.load(str(tmp_path / "config.yaml")) == derived


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trian.steps=3", "trian: no such key; did you mean 'train'?"),
        ("train.stesp=3", "train.stesp: no such key; did you mean 'steps'?"),
        ("train.steps=many", "train.steps: found 'many': input should be a valid integer"),
        ("train.steps=true", "train.steps: found True"),
        ("train.steps=0", "train.steps: found 0: input should be greater than or equal to 1"),
        ("train.optimizer=sgd", "train.optimizer: found 'sgd': input should be 'adamw' or 'muon'"),
        ("tasks.pose.croop=1", "tasks.pose.croop: no such key; did you mean 'crop'?"),
        ("tasks.pose.crop=abc", "tasks.pose.crop: found 'abc'"),
        ("tasks.poze.crop=1", "tasks: no task is called 'poze'"),
        ("teacher.model.widht=3", "teacher.model.widht: no such key; did you mean 'width'?"),
        ("balance.ratios.x=3", "balance.ratios names 'x'"),
        ("model.width=100", "model.width 100 must be"),
        ("size=60", "size 60 is not a multiple of tokenizer.patch 8"),
        ("evaluate.examples=4", "evaluate.examples is 4: sentences of 4 pairs take at most 3"),
        ("evaluate.draws.depth=8", "evaluate.draws names 'depth'"),
        ("evaluate.draws.pose=-1", "evaluate.draws.pose is -1"),
        ("train.image_weight=-1", "train.image_weight: found -1: a weight is a number from 0 up, or [first, last]"),
        ("distill.weight=[1.0]", "distill.weight: found (1.0,): a weight is a number from 0 up, or [first, last]"),
        ("distill.weight=[1.0, .inf]", "distill.weight: found (1.0, inf)"),
        ("distill.weight=much", "distill.weight: found 'much'"),
        ("distill.divergence=kl", "distill.divergence: found 'kl': input should be 'forward_kl', 'reverse_kl' or 'jsd'"),
        ("distill.beta=1", "distill.beta: found 1: input should be less than 1"),
        ("distill.also.teacher={teacher: runs/x}", "distill.also: the name 'teacher' is the first teacher's"),
        ("distill={on_policy: 0.5, cache: runs/x}", "distill.on_policy: the student's own answers are in no cache"),
        ("distill.layers=[0]", "distill.layers names 1 layers, model.layers is 3"),
        ("run", "--set run: write it as key.path=value"),
        ("run.x=3", "run holds a single value"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(setting: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        config.load(DEMO, [setting])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        "run=s3://reader:hunter2@bucket/runs",
        "shards=s3://reader:hun/ter2@bucket/shards?region=x",
        "tasks.pose.train.images=s3://bucket/images?secret_key=hunter2",
        "tasks.pose.train=s3://reader:hunter2@bucket/images",
        "seed=s3://reader:hunter2@bucket",
        "nothing=[s3://reader:hunter2@bucket]",
        "run.x=s3://reader:hunter2@bucket",
    ],
)
def test_credentials_are_refused_and_not_shown(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenize", DEMO, "--dry-run", "--set", setting]) == 2
    out, message = capsys.readouterr()
    assert out == "" and "ter2" not in message and message.count("\n") == 1
    if not setting.startswith("run.x"):
        assert f"{setting.split('=')[0]}" in message and "put the keys into the environment (AWS_ACCESS_KEY_ID, ...)" in message


def test_uris_without_credentials_stay() -> None:
    place = "s3://bucket/shards?region=us-east-1&scheme=http&endpoint_override=minio:9000"
    assert config.load(DEMO, [f"shards={place}"]).shards == place


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not a text file"),
        (b"a: [", "not valid YAML"),
        (b"- 1", "a recipe is a mapping"),
        (b"seed: 1", "tasks: missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        config.load(str(path))
    with pytest.raises(UserError, match="cannot read the recipe"):
        config.load(str(tmp_path / "none.yaml"))


def test_settings_and_run_change_the_recipe_and_paths_follow_the_run(tmp_path: Path) -> None:
    recipe = config.load(DEMO, ["train.rate=3e-4", "distill.temperature=2"], run="elsewhere/")
    assert recipe.train.rate == 3e-4
    assert recipe.distill is not None and recipe.distill.temperature == 2
    assert recipe.run == "elsewhere"
    assert recipe.tasks["pose"].train.images.startswith("elsewhere/")  # type: ignore[attr-defined]


def test_the_teacher_differs_only_in_its_section_and_has_nothing_to_distil_from() -> None:
    recipe = config.load(DEMO)
    teacher, student = config.teacher_recipe(recipe), config.student_recipe(recipe)
    assert teacher.distill is None and teacher.teacher is None and student.teacher is None
    assert student.distill is not None and student.distill.teacher == teacher.run == f"{recipe.run}/teacher"
    assert recipe.teacher is not None
    assert teacher.model == recipe.model.model_copy(update=recipe.teacher.model)
    assert teacher.shard_folder == student.shard_folder == recipe.shard_folder


def test_the_fingerprint_ignores_where_a_run_is_and_sees_what_it_computes() -> None:
    recipe = config.load(DEMO)
    same = config.load(DEMO, ["compute.workers=2", "evaluate.items=3"])
    assert config.fingerprint(recipe) == config.fingerprint(same)
    assert config.fingerprint(recipe) != config.fingerprint(config.load(DEMO, ["seed=77"]))
