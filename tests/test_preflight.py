"""Checks before a run: what each refuses and says, that none leaves a trace, and how near the estimates come."""

import math
import os
from pathlib import Path

import pytest
import torch

import lvm_ray.tokenizer
from lvm_ray import cli, config, estimate
from lvm_ray.data.stream import accumulation, require_even_batch
from lvm_ray.errors import UserError
from lvm_ray.model.llama import build
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train import launch, preflight, rehearsal
from lvm_ray.train.losses import TrainingModule

from .toys import CODES, IMAGE_TOKENS, load_toy_tokenizer, make_toy_shards, toy_recipe

TOKENS = 32


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


def refusal(check, *arguments):
    with pytest.raises(UserError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The batch


@pytest.mark.parametrize(
    ("workers", "batch", "micro_batch", "words"),
    [
        (3, 16, 4, ["16 sentences", "3 workers", "train.batch 12 or 24", "compute.workers 1 or 2 or 4"]),
        ((1, 3), 16, 2, ["3 workers of compute.workers [1, 3]", "train.batch 12 or 24", "compute.workers 1 or 2 or 4 or 8"]),
        (2, 8, 5, ["2 workers", "train.batch 10", "train.micro_batch 1 or 2 or 4"]),
        (1, 2, 4, ["1 worker in", "train.batch 4", "train.micro_batch 1 or 2"]),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_numbers_that_fit(tmp_path, workers, batch, micro_batch, words):
    recipe = toy_recipe(tmp_path, train={"batch": batch, "micro_batch": micro_batch}, compute={"workers": workers})
    message = refusal(preflight.check_batch, recipe)
    assert message == refusal(require_even_batch, recipe)
    for word in words:
        assert word in message


@pytest.mark.parametrize(("workers", "batch", "micro_batch"), [(3, 16, 4), ((2, 4), 40, 3), (5, 7, 2)])
def test_the_numbers_that_a_refusal_names_do_fit(tmp_path, workers, batch, micro_batch):
    def recipe(**changes):
        train = {"batch": batch, "micro_batch": micro_batch}
        train |= {key: value for key, value in changes.items() if key != "workers"}
        return toy_recipe(tmp_path, train=train, compute={"workers": changes.get("workers", workers)})

    choices = refusal(preflight.check_batch, recipe()).split("these would fit: ")[1]
    assert choices
    for choice in choices.split("; "):
        field, numbers = choice.split(" ", 1)
        for number in numbers.split(" or "):
            require_even_batch(recipe(**{field.split(".")[1]: int(number)}))


def test_every_number_of_a_range_shares_the_batch(tmp_path):
    recipe = toy_recipe(tmp_path, train={"batch": 24, "micro_batch": 2}, compute={"workers": [2, 4]})
    assert preflight.check_batch(recipe) == "24 sentences = 2 to 4 workers x 6 or 3 micro batches of 2"
    assert [accumulation(recipe, workers) for workers in (2, 3, 4)] == [6, 4, 3]


# The machines


def test_more_workers_than_the_cluster_has_are_refused(tmp_path, ray_session):
    message = refusal(preflight.check_cluster, toy_recipe(tmp_path, compute={"workers": 64}))
    assert "compute.workers: 64" in message and "ask for at most" in message
    assert "CPUs" in preflight.check_cluster(toy_recipe(tmp_path, compute={"workers": [1, 64]})), "the least number counts"
    if not torch.cuda.is_available():
        message = refusal(preflight.check_cluster, toy_recipe(tmp_path, compute={"workers": 1, "device": "cuda"}))
        assert "0 GPUs" in message
        assert "no GPU" in refusal(preflight.check_cluster, toy_recipe(tmp_path, compute={"workers": 0, "device": "cuda"}))


def test_a_model_beyond_the_machine_is_refused_with_what_to_lower(tmp_path):
    large = {"width": 65536, "heads": 8, "layers": 100, "mlp": 200_000}
    message = refusal(preflight.check_memory, toy_recipe(tmp_path, model=large))
    assert "memory: 1 worker of about" in message and "GiB" in message
    assert "train.micro_batch" in message and "train.checkpoint_activations" in message and "train.zero" not in message
    assert "GiB a worker" in preflight.check_memory(toy_recipe(tmp_path))


# Storage


def test_storage_is_tried_and_left_as_it_was(tmp_path):
    recipe = toy_recipe(tmp_path / "new" / "run")
    assert "writable" in preflight.check_storage(recipe)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "run").mkdir(parents=True)
    assert "writable" in preflight.check_storage(recipe)
    assert list((tmp_path / "new" / "run").iterdir()) == []
    assert "writable" in preflight.check_storage(toy_recipe(f"file://{tmp_path}/new/run"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refusal(preflight.check_storage, toy_recipe(tmp_path / "file" / "run"))
    assert "file/run" in message and "cannot write" in message
    make_toy_shards(tmp_path / "shards")
    assert "cannot write" in refusal(launch.train, toy_recipe(tmp_path / "file", shards=str(tmp_path / "shards")), None)


def test_storage_and_shards_are_tried_by_workers(tmp_path, ray_session):
    recipe = toy_recipe(tmp_path / "run", shards=str(tmp_path / "shards"), compute={"workers": 1})
    make_toy_shards(recipe.shards)
    assert "from 1 node" in preflight.check_storage(recipe)
    assert "readable" in preflight.check_shards(recipe)
    assert not (tmp_path / "run").exists()
    (broken,) = (tmp_path / "shards/train/invert").rglob("*.parquet")
    broken.unlink()
    assert str(broken) in refusal(preflight.check_shards, recipe)


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path):
    message = refusal(preflight._write_beside, str(tmp_path), ".preflight-elsewhere", b"content")
    assert str(tmp_path) in message and os.uname().nodename in message and "share" in message and "URI" in message


# Shards


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"PAR1" + path.read_bytes()[200:]), "lacks some of its bytes"),
        (lambda path: path.write_bytes(path.with_name("other").read_bytes()), "has 8 rows, the manifest says 24"),
    ],
)
@pytest.mark.parametrize("uri", [False, True])
def test_a_missing_cut_or_exchanged_shard_is_named(tmp_path, damage, words, uri):
    shards = tmp_path / "shards"
    recipe = toy_recipe(tmp_path / "run", shards=f"file://{shards}" if uri else str(shards))
    make_toy_shards(shards)
    assert preflight.check_shards(recipe) == "12 files of 88 rows are readable"
    (broken,) = (shards / "train/invert").rglob("*.parquet")
    (other,) = (shards / "train/swap/copy-000").rglob("*.parquet")
    broken.with_name("other").write_bytes(other.read_bytes())
    damage(broken)
    message = refusal(preflight.check_shards, recipe)
    assert str(broken) in message and words in message and "lvm-ray tokenize" in message


# The rehearsal


def module_of(**changes):
    codebook = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(1))
    student = build(ModelSection(width=32, layers=2, heads=2, mlp=64), codebook, TOKENS, IMAGE_TOKENS, seed=0)
    return TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.1, **changes)


def tokens_of(batch=4):
    return torch.randint(0, CODES, (batch, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("again", [False, True])
def test_a_rehearsal_leaves_no_trace(tmp_path, precision, again):
    module, recipe = module_of(), toy_recipe(tmp_path, compute={"precision": precision})
    if again:  # the layers are computed again for their gradient
        module.student.gradient_checkpointing_enable({"use_reentrant": False})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    loss = rehearsal.rehearse(module, tokens_of(), recipe, {}, "here")
    with torch.no_grad():
        wanted = module(tokens_of()).loss.item()
    assert loss == pytest.approx(wanted, rel=1e-5 if precision == "fp32" else 0.02)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype, name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_numbers_that_overflow_are_one_line(tmp_path):
    module = module_of()
    with torch.no_grad():
        module.student.lm_head.weight[0, 0] = torch.nan
    message = refusal(rehearsal.rehearse, module, tokens_of(), toy_recipe(tmp_path), {}, "step 1 (rows 0 to 3 of the plan)")
    assert "step 1 (rows 0 to 3 of the plan)" in message and "fp32" in message
    message = refusal(rehearsal.rehearse, module, tokens_of(), toy_recipe(tmp_path, compute={"precision": "bf16"}), {}, "here")
    assert "set compute.precision to fp32" in message


def test_short_memory_is_one_line_with_what_to_lower(tmp_path):
    class Hungry(TrainingModule):
        def forward(self, *arguments, **keywords):
            return torch.empty(2**50)  # torch itself says what it cannot have

    hungry = Hungry(module_of().student, TOKENS, IMAGE_TOKENS, 0.1)
    message = refusal(rehearsal.rehearse, hungry, tokens_of(), toy_recipe(tmp_path), {}, "here")
    assert "train.micro_batch: 4 sentences of 32 tokens" in message and "train.checkpoint_activations: true" in message


def test_a_teacher_that_knows_nothing_is_refused(tmp_path):
    teacher = module_of()
    with torch.no_grad():
        teacher.student.lm_head.weight.zero_()
    message = refusal(rehearsal.check_teacher_loss, teacher, tokens_of(), {}, "distill.also.cnn.teacher", "runs/teacher")
    assert "distill.also.cnn.teacher: runs/teacher" in message and f"{math.log(CODES):.3f}" in message


# Estimates


@pytest.mark.parametrize("embedding", ["codebook", "table"])
def test_parameters_are_those_of_the_built_model(embedding):
    section = ModelSection(width=48, layers=3, heads=4, mlp=80, embedding=embedding)
    model = build(section, torch.randn(CODES, 5), TOKENS, IMAGE_TOKENS, seed=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    projection = 5 * 48 if embedding == "codebook" else 0
    assert estimate.trained_parameters(section, CODES) + projection == count
    table = projection or estimate.table_parameters(section, CODES)
    assert estimate.parameters(section, CODES) == count - table


def test_a_checkpoint_is_as_large_as_estimated(tmp_path):
    for optimizer in ("adamw", "muon"):
        recipe = toy_recipe(
            tmp_path / optimizer,
            shards=str(tmp_path / "shards"),
            model={"embedding": "table"},
            train={"steps": 1, "optimizer": optimizer},
        )
        if optimizer == "adamw":
            make_toy_shards(recipe.shards)
        run = launch.train(recipe, Bar("train", None, "steps"))
        size = sum(path.stat().st_size for path in (run / "checkpoints/step-000001").glob("*.safetensors"))
        assert size == pytest.approx(estimate.checkpoint_bytes(recipe), rel=0.15)  # the rest is the tensors' names


def test_memory_follows_stage_workers_and_layers_computed_again(tmp_path):
    def memory(workers=4, **train):
        return estimate.memory(toy_recipe(tmp_path, train=train, compute={"workers": workers}))

    stages = [memory(zero=stage) for stage in range(4)]
    assert stages[0].moments == 4 * stages[1].moments and stages[1].gradients > stages[2].gradients
    assert stages[3].weights == stages[2].weights / 4
    assert memory(workers=1, zero=1).masters == 4 * memory(zero=1).masters
    assert memory(checkpoint_activations=True).activations < memory().activations
    assert memory(micro_batch=8).activations == 2 * memory().activations


# Dry runs


def dry_run(recipe, folder, *arguments):
    path = Path(folder) / "recipe.yaml"
    path.write_text(config.dump(recipe))
    return cli.main(["train", str(path), "--dry-run", *arguments])


def test_a_dry_run_estimates_and_checks_and_leaves_nothing(tmp_path, capsys):
    recipe = toy_recipe(tmp_path / "run", shards=str(tmp_path / "shards"))
    make_toy_shards(recipe.shards)
    assert dry_run(recipe, tmp_path) == 0
    out = capsys.readouterr().out
    words = ("with the input table", "of memory a worker", "a checkpoint on disk", "hours of this machine", "stage: 1")
    for word in (*words, "DeepSpeed's configuration", "✓ run: batch", "✓ run: rehearsal", "a micro batch passes"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_without_data_says_what_waits(tmp_path, capsys):
    assert dry_run(toy_recipe(tmp_path / "run"), tmp_path) == 0
    out = capsys.readouterr().out
    assert "run: shards and rehearsal wait for data: run lvm-ray tokenize" in out and "✓ run: storage" in out


def test_a_dry_run_of_a_pipeline_rehearses_the_teacher_and_waits_with_the_student(tmp_path, capsys):
    recipe = toy_recipe(tmp_path / "run", shards=str(tmp_path / "shards"), distill={}, teacher={"model": {"layers": 3}})
    make_toy_shards(recipe.shards)
    assert dry_run(recipe, tmp_path) == 0
    out = capsys.readouterr().out
    assert "✓ teacher: rehearsal" in out and "student: rehearsal waits for the teacher" in out
    assert dry_run(recipe, tmp_path, "--only", "teacher") == 0
    assert "student" not in capsys.readouterr().out.split("teacher:")[-1]


def test_a_dry_run_in_which_a_check_fails_exits_2(tmp_path, capsys):
    recipe = toy_recipe(tmp_path / "run", shards=str(tmp_path / "shards"), compute={"workers": 3})
    assert dry_run(recipe, tmp_path) == 2
    captured = capsys.readouterr()
    assert "3 workers" in captured.err and len(captured.err.splitlines()) == 1 and "GPU" not in captured.err
    assert "parameters" in captured.out, "the estimates come first"


def test_the_rehearsal_of_workers_runs_in_one(tmp_path, ray_session):
    recipe = toy_recipe(tmp_path / "run", shards=str(tmp_path / "shards"), compute={"workers": 1})
    make_toy_shards(recipe.shards)
    assert "a micro batch passes" in launch.rehearse(recipe)
