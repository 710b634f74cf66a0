"""Training end to end on toys: the engine at every ZeRO stage, resuming to the bit, workers that agree, and refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lvm_ray.tokenizer
from lvm_ray import config
from lvm_ray.data.plan import make_plan
from lvm_ray.data.shards import open_shards
from lvm_ray.data.stream import read_rows
from lvm_ray.errors import UserError
from lvm_ray.model.folder import load_model
from lvm_ray.model.generate import Decoder
from lvm_ray.model.llama import build
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train import checkpoint, engine, job, launch, work, workers
from lvm_ray.train.engine import Engine
from lvm_ray.train.losses import TrainingModule
from lvm_ray.train.meter import read_metrics

from .toys import crash_after, journal, load_toy_tokenizer, make_toy_shards, toy_recipe

CODES, TOKENS, IMAGE_TOKENS = 64, 32, 4


class Silent:
    """A bar that remembers."""

    def __init__(self):
        self.calls = []

    def set(self, done, note="", left=None):
        self.calls.append((done, note))


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


def recipe_of(folder, shards, **changes):
    return toy_recipe(folder, **({"shards": shards} | changes))


def train(recipe):
    return launch.train(recipe, Silent())


def train_with_a_crash(recipe, monkeypatch, micro_batches):
    """The stream is lost after so many micro batches; the same command goes on."""
    with monkeypatch.context() as patch:
        crash_after(patch, micro_batches)
        with pytest.raises(ConnectionError):
            train(recipe)
    return train(recipe)


# The engine


def engine_of(parameters=None, precision="fp32", accumulation=2, **changes):
    compute = {"device": "cpu", "precision": precision, **{name: changes.pop(name) for name in ("compile",) if name in changes}}
    recipe = toy_recipe("engine", train={"batch": 4, "micro_batch": 2, "rate": 1e-2} | changes, compute=compute)
    codebook = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(1))
    student = build(ModelSection(width=32, layers=2, heads=2, mlp=64), codebook, TOKENS, IMAGE_TOKENS, seed=0)
    if parameters:
        student.load_state_dict(parameters)
    return Engine(TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.1), recipe, accumulation)


def global_batches(count, accumulation=2):
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(0, CODES, (2, TOKENS), generator=generator) for _ in range(accumulation)] for _ in range(count)]


def steps(engine, batches):
    results = []
    for batch in batches:
        losses = engine.step(batch, 0.5, lambda losses: None)
        results.append([*(outcome.loss.item() for outcome in losses), engine.gradient_norm])
    return results


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("zero", "precision", "accumulation"),
    [(0, "fp32", 2), (1, "fp32", 2), (3, "fp32", 2), *((zero, "bf16", micro) for zero in (1, 2, 3) for micro in (1, 2))],
)
def test_weights_and_moments_restore_to_the_bit_at_every_stage(zero, precision, accumulation, optimizer):
    batches = global_batches(5, accumulation)
    engine = engine_of(zero=zero, precision=precision, accumulation=accumulation, optimizer=optimizer)
    steps(engine, batches[:2])
    parameters, moments = engine.parameters(), engine.moments()
    undisturbed = steps(engine, batches[2:])
    engine.close()

    engine = engine_of(parameters, zero=zero, precision=precision, accumulation=accumulation, optimizer=optimizer)
    engine.restore(parameters, moments, 2, batches[0][0])
    for found, wanted in ((engine.parameters(), parameters), (engine.moments(), moments)):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert steps(engine, batches[2:]) == undisturbed
    engine.close()


@pytest.mark.parametrize("changes", [{"checkpoint_activations": True}, {"offload": True}])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_saves_memory_changes_no_loss(zero, changes):
    results = []
    for each in ({}, changes):
        engine = engine_of(zero=zero, **each)
        results.append(steps(engine, global_batches(3)))
        engine.close()
    for found, wanted in zip(*results, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stages_differ_in_what_they_share_out_and_not_in_the_losses(optimizer):
    results = []
    for zero in range(4):
        engine = engine_of(zero=zero, optimizer=optimizer)
        results.append(steps(engine, global_batches(4)))
        engine.close()
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_adamw_is_torchs_with_accumulation_and_clipping():
    batches = global_batches(4)
    engine = engine_of(zero=1, clip=0.1)
    found = steps(engine, batches)
    engine.close()

    codebook = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(1))
    student = build(ModelSection(width=32, layers=2, heads=2, mlp=64), codebook, TOKENS, IMAGE_TOKENS, seed=0)
    module = TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.1)
    groups = [
        {"params": [parameter for parameter in student.parameters() if parameter.ndim >= 2]},
        {"params": [parameter for parameter in student.parameters() if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for batch, (*losses, norm) in zip(batches, found, strict=True):
        optimizer.zero_grad()
        wanted = [module(tokens).loss for tokens in batch]
        torch.stack(wanted).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1).item() == pytest.approx(norm, rel=1e-4)
        optimizer.step()
        assert losses == pytest.approx([loss.item() for loss in wanted], rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_clipping_does_not_shrink_muons_update(zero):
    """Its update is orthogonal and has a size of its own: about the rate x the square root of the rank."""
    name = "model.layers.0.self_attn.v_proj.weight"
    moved = []
    for clip in (1e-6, 1e6):
        engine = engine_of(zero=zero, optimizer="muon", muon_rate=0.02, weight_decay=0.0, clip=clip)
        before = engine.parameters()
        steps(engine, global_batches(1))
        moved.append(engine.parameters()[name] - before[name])
        engine.close()
    assert torch.equal(*moved)
    # The toy codebook has 5 components, hence the first layer's gradient rank 5.
    assert moved[0].norm().item() == pytest.approx(0.5 * 0.02 * 5**0.5, rel=0.2)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_muon_remembers_gradients_as_long_as_the_recipe_says(zero):
    """After one step its momentum is (1 - muon_momentum) x the gradient."""
    name = "momentum_buffer/model.layers.0.self_attn.v_proj.weight"
    remembered = []
    for momentum in (0.95, 0.75):
        engine = engine_of(zero=zero, optimizer="muon", muon_momentum=momentum)
        steps(engine, global_batches(1))
        remembered.append(engine.moments()[name])
        engine.close()
    assert remembered[1].norm() > 0
    torch.testing.assert_close(remembered[1], 5 * remembered[0])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_losses_are_checked_once_before_they_move_a_weight(zero):
    engine = engine_of(zero=zero)
    (batch,) = global_batches(1)
    seen = []

    def refuse(losses):
        seen.append(len(losses))
        raise UserError("not a number")

    before = engine.parameters()
    with pytest.raises(UserError):
        engine.step(batch, 1.0, refuse)
    assert seen == [2]
    assert all(torch.equal(value, before[name]) for name, value in engine.parameters().items())
    engine.close()


def test_nothing_is_compiled(tmp_path):
    """Machines of users have no C++ compiler: Muon and AdamW train without one and start no build."""
    script = "\n".join(
        [
            "from tests.test_train import engine_of, global_batches, steps",
            "for optimizer in ('adamw', 'muon'):",
            "    steps(engine_of(optimizer=optimizer), global_batches(1))",
        ]
    )
    environment = {
        **os.environ,
        "PATH": "/nonexistent",
        "CXX": "/nonexistent/c++",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"),
    }
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "built").exists()


# Whole runs, in this process


def test_a_run_folder_holds_what_it_should(tmp_path, shards):
    train = {"steps": 60, "rate": 1e-2, "log_every": 20, "checkpoint_every": 25, "keep_best": 0}
    recipe = recipe_of(tmp_path / "run", shards, train=train)
    bar = Silent()
    run = launch.train(recipe, bar)
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [20, 25, 40, 50, 60]
    assert [line["rows"] for line in metrics] == [160, 200, 320, 400, 480]
    assert metrics[-1]["tokens"] == 480 * recipe.sentence_tokens
    assert metrics[-1]["kd"] is None
    assert set(metrics[-1]["target_loss"]) == set(recipe.tasks)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert all(line["tokens_per_s"] > 0 for line in metrics)
    assert bar.calls[-1][0] == 60
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000050", "step-000060"]

    written = config.load(str(run / "config.yaml"))
    assert config.fingerprint(written) == config.fingerprint(recipe)
    assert written.compute.threads == 1
    model, tokenizer = load_model(run / "model", codebook="toy-64-colours")
    assert tokenizer["image_tokens"] == recipe.image_tokens
    trained, _ = checkpoint.load(run / "checkpoints" / "step-000060")
    assert torch.equal(model.lm_head.weight, trained["lm_head.weight"])
    assert tokenizer["size"] == recipe.size


def test_a_finished_run_returns_at_once(tmp_path, shards, monkeypatch):
    recipe = recipe_of(tmp_path / "run", shards)
    run = train(recipe)
    before = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(work, "work", lambda *arguments: pytest.fail("trained again"))
    bar = Silent()
    assert launch.train(recipe, bar) == run
    assert bar.calls == [(8, "already trained")]
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_crashed_run_goes_on_to_the_bit(tmp_path, shards, monkeypatch, optimizer):
    changes = {"train": {"optimizer": optimizer, "log_every": 1}}
    undisturbed = train(recipe_of(tmp_path / "whole", shards, **changes))

    recipe = recipe_of(tmp_path / "run", shards, **changes)
    with monkeypatch.context() as patch:
        crash_after(patch, 2 * 6 + 1)  # in step 7 of 8, after the checkpoint at 4 and lines to 6
        with pytest.raises(ConnectionError):
            train(recipe)
    assert [line["step"] for line in read_metrics(recipe.run)] == [1, 2, 3, 4, 5, 6]
    run = train(recipe)
    assert journal(run) == journal(undisturbed)
    seconds = [line["seconds"] for line in read_metrics(run)]
    assert seconds == sorted(seconds)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "checkpoints/step-000008" / name).read_bytes() == (
            undisturbed / "checkpoints/step-000008" / name
        ).read_bytes()


def test_a_run_that_only_lacks_its_model_exports_it(tmp_path, shards, monkeypatch):
    recipe = recipe_of(tmp_path / "run", shards)
    run = train(recipe)
    (run / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(work, "work", lambda *arguments: pytest.fail("trained again"))
    train(recipe)
    load_model(run / "model")


def test_distillation_follows_the_teacher(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards, model={"width": 48}, train={"steps": 30, "rate": 1e-2}))
    distill = {"teacher": str(teacher), "temperature": 2.0, "weight": 1.0}
    run = train(recipe_of(tmp_path / "student", shards, distill=distill, train={"steps": 30, "rate": 1e-2, "log_every": 1}))
    metrics = read_metrics(run)
    for line in metrics:
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"], abs=1e-5)
    assert metrics[-1]["kd"] < metrics[0]["kd"]
    parameters, _ = checkpoint.load(checkpoint.latest(run))
    assert parameters["lm_head.weight"].shape == (CODES, 32), "the student alone is saved"


def test_a_teacher_of_one_task_is_checked_and_asked_on_that_task_alone(tmp_path, shards):
    """What it knows nothing of does not count against it: it is a specialist."""
    shares = {"invert": 1.0, "threshold": 0.0, "swap": 0.0}
    changes = {"balance": {"shares": shares}, "train": {"steps": 60, "rate": 2e-2}}
    teacher = train(recipe_of(tmp_path / "teacher", shards, **changes))
    rows = {"invert": 0.1, "threshold": 0.5, "swap": 0.4}
    distill = {"teacher": str(teacher), "weights": {"threshold": 0, "swap": 0}}
    run = train(recipe_of(tmp_path / "student", shards, distill=distill, balance={"shares": rows}))
    of_tasks = [line["teachers"]["teacher"]["kd"] for line in read_metrics(run)]
    assert all(kd["threshold"] == 0 for kd in of_tasks) and any(kd["invert"] for kd in of_tasks if kd["invert"] is not None)
    nowhere = recipe_of(tmp_path / "nowhere", shards, distill=distill, balance={"shares": rows | {"invert": 0.0}})
    assert "distill.weights: the plan has no rows of invert" in refusal(nowhere)


def test_a_teacher_is_judged_by_what_it_knows_and_not_by_what_its_tasks_weigh(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards, train={"steps": 30, "rate": 1e-2}))
    shares = {"invert": 0.05, "threshold": 0.45, "swap": 0.5}
    balance = {"shares": shares, "weights": {"invert": 50.0}}
    distill = {"teacher": str(teacher), "weights": {"threshold": 0, "swap": 0}}
    train(recipe_of(tmp_path / "student", shards, distill=distill, balance=balance, train={"steps": 2}))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"depth": 1.0}, r"distill\.weights names 'depth'"),
        ({"swap": -1.0}, r"distill\.weights\.swap is -1\.0"),
        ({"invert": 0, "threshold": 0, "swap": 0}, r"distill\.weights: every task weighs 0"),
    ],
)
def test_impossible_weights_of_a_teachers_tasks_are_refused(tmp_path, weights, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(tmp_path, "shards", distill={"teacher": "runs/teacher", "weights": weights})
    also = {"second": {"teacher": "runs/teacher", "weights": weights}}
    with pytest.raises(ValueError, match=words.replace("distill", r"distill\.also\.second")):
        recipe_of(tmp_path, "shards", distill={"teacher": "runs/teacher", "also": also})


def test_equal_weights_of_tasks_are_none(tmp_path, shards):
    plain = train(recipe_of(tmp_path / "plain", shards))
    equal = train(recipe_of(tmp_path / "equal", shards, balance={"weights": dict.fromkeys(("invert", "threshold", "swap"), 0.3)}))
    assert journal(equal) == journal(plain)
    name = "model/model.safetensors"
    assert (equal / name).read_bytes() == (plain / name).read_bytes()


def test_a_task_that_weighs_nothing_teaches_nothing(tmp_path, shards):
    """The same plan over other tokens of the task without weight: with accumulation and a teacher, no weight differs by a bit."""
    teacher = train(recipe_of(tmp_path / "teacher", shards))
    folders = []
    for seed in (0, 1):
        make_toy_shards(tmp_path / f"swap-{seed}", {"swap": (8, 2)}, seed=seed)
        place = tmp_path / f"shards-{seed}"
        shutil.copytree(shards, place)
        for path in (tmp_path / f"swap-{seed}" / "train" / "swap").rglob("*.parquet"):
            shutil.copy(path, place / path.relative_to(tmp_path / f"swap-{seed}"))
        changes = {"balance": {"weights": {"swap": 0.0, "invert": 2.0}}, "distill": {"teacher": str(teacher)}}
        folders.append(train(recipe_of(tmp_path / f"run-{seed}", str(place), train={"log_every": 1}, **changes)))
    first, second = (read_metrics(folder) for folder in folders)
    targets = [[line["target_loss"] for line in metrics] for metrics in (first, second)]
    assert [line["invert"] for line in targets[0]] == [line["invert"] for line in targets[1]]
    assert [line["swap"] for line in targets[0]] != [line["swap"] for line in targets[1]], "it is watched all the same"
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert len({(folder / "model" / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_an_heir_is_the_same_to_the_bit_in_every_run(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards))
    distill = {"teacher": str(teacher), "layers": [0, 1]}
    models = {
        (train(recipe_of(tmp_path / f"run-{k}", shards, distill=distill)) / "model" / "model.safetensors").read_bytes()
        for k in range(3)
    }
    assert len(models) == 1


def test_a_student_of_all_its_teachers_layers_starts_where_the_teacher_ended(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards))
    fresh = {"teacher": str(teacher)}
    first = []
    for name, distill in (("heir", fresh | {"layers": [0, 1]}), ("fresh", fresh)):
        run = train(recipe_of(tmp_path / name, shards, distill=distill, model={"layers": 2}, train={"log_every": 1}))
        first.append(read_metrics(run)[0]["kd"])
    assert first[0] < 0.01 * first[1]


# Refusals: one line that names what is wrong


def refusal(recipe):
    with pytest.raises(UserError) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(tmp_path, shards):
    message = refusal(recipe_of(tmp_path / "run", shards, train={"rate": 1e30}))
    assert "step 2" in message and "nan" in message and "rows 8 to 15" in message
    assert checkpoint.latest(tmp_path / "run") is None


def test_checkpoints_of_another_recipe_are_refused(tmp_path, shards):
    train(recipe_of(tmp_path / "run", shards))
    assert "another recipe" in refusal(recipe_of(tmp_path / "run", shards, train={"steps": 9}))


def test_shards_of_another_codebook_are_refused(tmp_path):
    make_toy_shards(tmp_path / "shards", tokenizer="another")
    assert "codebook another" in refusal(recipe_of(tmp_path / "run", str(tmp_path / "shards")))
    assert not (tmp_path / "run").exists()


def test_weights_change_on_a_straight_line_over_the_steps(tmp_path, shards, monkeypatch):
    teacher, seen, step = train(recipe_of(tmp_path / "teacher", shards)), [], Engine.step

    def spy(self, tokens, rate, check, sentences):
        seen.append({name: values.tolist() for name, values in sentences[0].items()})
        return step(self, tokens, rate, check, sentences)

    monkeypatch.setattr(Engine, "step", spy)
    distill = {"teacher": str(teacher), "weight": [2.0, 0.0], "also": {"second": {"teacher": str(teacher), "weight": 0.5}}}
    changes = {"distill": distill, "train": {"steps": 5, "image_weight": [0.0, 1.0]}}
    train(recipe_of(tmp_path / "run", shards, **changes))
    assert [one["image_weight"] for one in seen] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [one["strengths_N"] for one in seen] == [[2.0, 0.5], [1.5, 0.5], [1.0, 0.5], [0.5, 0.5], [0.0, 0.5]]


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """DeepSpeed computes fp16 here, but says that it does not; recipes come resolved."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(launch, "resolve", lambda recipe: recipe)


@pytest.mark.usefixtures("fp16_on_a_cpu")
@pytest.mark.parametrize("zero", [0, 3])
def test_in_fp16_steps_whose_gradients_overflow_are_left_out_and_a_resumed_run_has_the_scale(tmp_path, shards, zero, monkeypatch):
    configure = engine.deepspeed_config

    def large_scale(*arguments):
        made = configure(*arguments)
        made["fp16"]["initial_scale_power"] = 24
        return made

    monkeypatch.setattr(engine, "deepspeed_config", large_scale)
    compute = {"precision": "fp16", "device": "cpu", "threads": 1}
    changes = {"compute": compute, "train": {"steps": 16, "log_every": 1, "zero": zero, "rate": 1e-2, "checkpoint_every": 4}}
    whole, cut = (recipe_of(tmp_path / name, shards, **changes) for name in ("whole", "cut"))
    lines = read_metrics(train(whole))
    left_out = [line["grad_norm"] is None for line in lines]
    assert all(left_out[:3]) and sum(left_out) < 12  # until the scale fits
    assert lines[-1]["loss"] < lines[0]["loss"]
    scales = [checkpoint.read_state(path).loss_scale[0] for path in sorted(Path(whole.run, "checkpoints").glob("step-*"))]
    assert all(scale < 2**24 for scale in scales)
    train_with_a_crash(cut, monkeypatch, 2 * 9 + 1)
    assert journal(cut.run) == journal(whole.run)


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_gradients_that_overflow_at_every_scale_are_one_line(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(Engine, "step", scaled_beyond_everything(Engine.step))
    compute = {"precision": "fp16", "device": "cpu", "threads": 1}
    message = refusal(recipe_of(tmp_path / "run", shards, compute=compute, train={"steps": 40}))
    assert "fp16: gradients overflow at every scale of the loss" in message


def scaled_beyond_everything(step):
    """Each step starts with a scale that overflows and cannot be lowered."""

    def scaled(self, *arguments):
        self._scaler.cur_scale = self._scaler.min_scale = 2.0**24
        return step(self, *arguments)

    return scaled


@pytest.mark.parametrize("zero", [1, 3])
def test_a_part_of_the_steps_is_about_the_students_own_answers(tmp_path, shards, monkeypatch, zero):
    teacher, seen, step = train(recipe_of(tmp_path / "teacher", shards, train={"steps": 20, "rate": 1e-2})), [], Engine.step

    def spy(self, tokens, rate, check, sentences=None):
        seen.append((tokens, sentences))
        return step(self, tokens, rate, check, sentences)

    monkeypatch.setattr(Engine, "step", spy)
    distill = {"teacher": str(teacher), "on_policy": 0.4, "temperature": 2.0}
    changes = {"distill": distill, "train": {"steps": 10, "log_every": 1, "zero": zero, "checkpoint_every": 5}}
    whole = recipe_of(tmp_path / "whole", shards, **changes)
    lines = read_metrics(train(whole))
    own = [step for step, (_, sentences) in enumerate(seen) if "own_answers" in sentences[0]]
    assert own == [2, 4, 7, 9]  # four of ten, evenly
    plan = make_plan(open_shards(shards).manifest, whole)
    for number, (tokens, _) in enumerate(seen):
        given = torch.from_numpy(read_rows(whole, plan, 8 * number, 8 * number + 8)["tokens"].astype(np.int64))
        same = torch.cat(list(tokens)) == given
        assert same[:, :-IMAGE_TOKENS].all() and same[:, -IMAGE_TOKENS:].all().item() == (number not in own)
    assert [line["ce"] is None for line in lines] == [step in own for step in range(10)]
    assert all(math.isfinite(line["loss"]) and line["kd"] > 0 for line in lines)
    cut = recipe_of(tmp_path / "cut", shards, **changes)
    train_with_a_crash(cut, monkeypatch, 2 * 7 + 1)
    assert journal(cut.run) == journal(whole.run)


def test_answers_of_a_student_that_trains_are_those_of_its_exported_model(tmp_path, shards):
    recipe = job.resolve(recipe_of(tmp_path / "run", shards, train={"steps": 20, "rate": 1e-2}))
    run = train(recipe)
    exported, _ = load_model(run / "model")
    student = job.fresh_model(job.make_job(recipe))
    student.load_state_dict(checkpoint.load(checkpoint.latest(run))[0])
    engine = Engine(TrainingModule(student, TOKENS, IMAGE_TOKENS, 0.1), recipe, 2)
    prompts = torch.randint(0, CODES, (2, TOKENS - IMAGE_TOKENS))
    decoder = Decoder.of(exported)
    wanted = decoder.draw(decoder.read(prompts), IMAGE_TOKENS, 1, 1.0, [3, 4])[:, 0]
    found = engine.draw(prompts, IMAGE_TOKENS, [3, 4])
    engine.close()
    assert found.tolist() == wanted.tolist() and len(set(found.flatten().tolist())) > 1


def test_a_teacher_of_another_codebook_is_refused(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards))
    path = teacher / "model" / "image_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hash": "another"}))
    message = refusal(recipe_of(tmp_path / "run", shards, distill={"teacher": str(teacher)}))
    assert "codebook another" in message and str(path) in message


def test_a_teacher_that_is_not_there_is_refused(tmp_path, shards):
    assert "nowhere" in refusal(recipe_of(tmp_path / "run", shards, distill={"teacher": str(tmp_path / "nowhere")}))
    assert "distill.teacher" in refusal(recipe_of(tmp_path / "run", shards, distill={"teacher": None}))


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(tmp_path, shards):
    message = refusal(recipe_of(tmp_path / "run", shards, compute={"workers": 3}))
    assert "8" in message and "3 workers" in message


def test_threads_and_precision_are_decided_and_kept(tmp_path, shards):
    recipe = recipe_of(tmp_path / "run", shards, compute={"workers": 0, "threads": None, "precision": "auto"})
    decided = job.resolve(recipe).compute
    assert decided.threads == os.cpu_count()
    assert decided.precision in ("bf16", "fp32")
    assert job.resolve(job.resolve(recipe)) == job.resolve(recipe)
    assert job.resolve(recipe_of(tmp_path / "run", shards, compute={"threads": 3})).compute.threads == 3


@pytest.mark.parametrize("native", [True, False])
def test_a_processor_without_bf16_trains_in_fp32_and_warns_of_bf16(tmp_path, shards, native, monkeypatch, capsys):
    monkeypatch.setattr(job, "computes_bf16", lambda: native)
    compute = {"workers": 0, "device": "cpu"}
    assert job.resolve(recipe_of(tmp_path, shards, compute=compute | {"precision": "auto"})).compute.precision == (
        "bf16" if native else "fp32"
    )
    assert not capsys.readouterr().out
    asked = job.resolve(recipe_of(tmp_path, shards, compute=compute | {"precision": "bf16"})).compute.precision
    assert asked == "bf16" and ("only emulates it" in capsys.readouterr().out) is not native


# On Ray


@pytest.mark.parametrize(("workers", "optimizer"), [(1, "adamw"), (2, "muon")])
def test_workers_read_the_same_rows_and_reach_the_same_losses(tmp_path, shards, ray_session, workers, optimizer):
    changes = {"train": {"optimizer": optimizer, "log_every": 1}, "balance": {"weights": {"swap": 3.0}}}
    alone = train(recipe_of(tmp_path / "alone", shards, **changes))
    together = train(recipe_of(tmp_path / "together", shards, compute={"workers": workers}, **changes))
    for found, wanted in zip(journal(together), journal(alone), strict=True):
        for key in ("target_loss", "target_perplexity", "validation_loss"):
            assert found.pop(key, {}) == pytest.approx(wanted.pop(key, {}), rel=1e-4 if key == "target_perplexity" else 1e-5)
        assert found.pop("kd") is wanted.pop("kd") is None
        assert found == pytest.approx(wanted, rel=1e-5)
    model, _ = load_model(together / "model")
    wanted_model, _ = load_model(alone / "model")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, wanted_model.state_dict()[name], atol=1e-5), name


def test_a_refusal_in_a_worker_reaches_the_driver(tmp_path, shards, ray_session):
    message = refusal(recipe_of(tmp_path / "run", shards, train={"rate": 1e30}, compute={"workers": 1}))
    assert "step 2" in message and "nan" in message


def test_layers_that_the_teacher_does_not_have_or_of_another_shape_are_refused(tmp_path, shards):
    teacher = train(recipe_of(tmp_path / "teacher", shards))
    distill = {"teacher": str(teacher), "layers": [0, 7]}
    message = refusal(recipe_of(tmp_path / "run", shards, distill=distill))
    assert "distill.layers: no layer 7: the teacher has layers 0 to" in message
    wider = recipe_of(tmp_path / "run", shards, distill=distill, model={"width": 48})
    assert "model.width is 48, the teacher's 32" in refusal(wider)
    assert not (tmp_path / "run").exists()


def test_shards_at_a_uri_need_a_tokenizer_at_a_path(tmp_path):
    recipe = toy_recipe(tmp_path / "pipeline/student", shards="s3://bucket/shards?region=us-east-1")
    with pytest.raises(UserError, match=r"^s3://bucket/shards\?region=us-east-1: tokens at a URI need .* copy it to ") as refused:
        job.tokenizer_folder(recipe)
    places = [f"{tmp_path}/pipeline/tokenizer", recipe.tokenizer_folder]
    for place in places:
        assert place in str(refused.value)
        Path(place).mkdir(parents=True)
        assert job.tokenizer_folder(recipe) == place


def test_workers_wait_for_another_node_where_too_few_cpus_are_left_for_the_data(monkeypatch):
    import ray.train

    left = iter([2.0, 2.0, 3.0])
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": next(left)})
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    workers.await_room()
    assert next(left, None) is None, "it went on as soon as there were three"
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match="2 CPUs are left, 2 workers and one CPU for the data want 3"):
        workers.await_room(within=0.0)
