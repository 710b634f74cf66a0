"""What one sees while it trains: every key of a line, the time left, the matmul rate, the profile, the terminal's note."""

import gzip
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import lvm_ray.tokenizer
from lvm_ray import estimate
from lvm_ray.errors import UserError
from lvm_ray.model.llama import build
from lvm_ray.progress import Bar
from lvm_ray.recipe_sections import ModelSection
from lvm_ray.train import launch, meter
from lvm_ray.train.checkpoint import State
from lvm_ray.train.losses import Losses
from lvm_ray.train.meter import Meter, cut_metrics, last_line, read_metrics

from .test_train import Silent, crash_after, journal
from .toys import load_toy_tokenizer, toy_recipe


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    """What the engine would have made."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def losses_of(ce, targets, *teachers):
    """`teachers`: (divergence of each sentence, entropy, agreement) of each."""
    kd = torch.tensor([of_sentences for of_sentences, *_ in teachers]).reshape(len(teachers), len(targets))
    answers = torch.tensor([rest for _, *rest in teachers]).reshape(len(teachers), 2)
    terms = (torch.tensor(value) for value in (ce + 0.5, ce, 0.5))
    return Losses(*terms, torch.tensor(targets), kd, answers[:, 0], answers[:, 1], torch.tensor(0.0))


def batch_of(*tasks):
    return {"tokens": np.zeros((len(tasks), 32), np.uint16), "task": np.array(tasks, np.int32)}


def meter_of(tmp_path, operations=1e6, rate=1e9, **section):
    return Meter(toy_recipe(tmp_path, train={"steps": 100, "checkpoint_every": 25} | section), operations, rate)


# A line


def test_a_line_holds_means_since_the_line_before(tmp_path):
    seen = meter_of(tmp_path)
    seen.add([losses_of(2.0, [1.0, 3.0]), losses_of(4.0, [2.0, 5.0])], [batch_of(0, 1), batch_of(0, 1)], 0.5)
    seen.add([losses_of(3.0, [3.0, 1.0])], [batch_of(0, 1)], 0.5)
    line = seen.line(State(step=2, rows=16, tokens=192, seconds=1.0), rate=1e-3, norm=0.25)
    assert line["loss"] == pytest.approx(3.5) and line["ce"] == pytest.approx(3.0) and line["kd"] is None
    assert line["target_loss"] == {"invert": 2.0, "threshold": 3.0, "swap": None}
    assert line["target_perplexity"] == {"invert": 7.3891, "threshold": 20.086, "swap": None}
    assert line["tokens_per_s"] == 192
    assert line["matmul_share"] == pytest.approx(192 * 1e6 / 1e9)
    assert (line["step"], line["rows"], line["tokens"], line["seconds"]) == (2, 16, 192, 1.0)
    assert (line["rate"], line["grad_norm"]) == (1e-3, 0.25)

    seen.add([losses_of(1.0, [1.0])], [batch_of(2)], 0.1)
    line = seen.line(State(step=3), rate=1e-3, norm=0.25)
    assert line["ce"] == 1.0 and line["target_loss"] == {"invert": None, "threshold": None, "swap": 1.0}


def test_a_line_tells_what_each_teacher_has_to_teach(tmp_path):
    recipe = toy_recipe(tmp_path, distill={"teacher": "one", "also": {"second": {"teacher": "two"}}})
    seen = Meter(recipe, 1e6, 1e9)
    seen.add([losses_of(2.0, [1.0, 3.0], ([0.25, 0.5], 1.5, 0.5), ([1.0, 2.0], 2.0, 0.25))], [batch_of(0, 1)], 0.5)
    seen.add([losses_of(2.0, [1.0, 3.0], ([0.75, 0.25], 2.5, 1.0), ([3.0, 4.0], 3.0, 0.75))], [batch_of(0, 0)], 0.5)
    line = seen.line(State(step=2), rate=1e-3, norm=0.25)
    assert line["kd"] == 0.5
    assert line["teachers"] == {
        "teacher": {"kd": {"invert": 0.416667, "threshold": 0.5, "swap": None}, "entropy": 2.0, "agreement": 0.75},
        "second": {"kd": {"invert": 2.666667, "threshold": 2.0, "swap": None}, "entropy": 2.5, "agreement": 0.5},
    }


def test_a_perplexity_is_a_number_whatever_the_loss():
    assert meter.perplexity(0.0) == 1.0
    assert math.isfinite(meter.perplexity(1e9))


# The time left


def test_time_left_is_the_latest_pace_and_the_checkpoints_on_the_way(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    seen = meter_of(tmp_path)

    def left(step, seconds):
        seen.add([losses_of(2.0, [1.0])], [batch_of(0)], seconds)
        return seen.line(State(step=step), 1e-3, 1.0)["eta_s"]

    # Resumed at step 40; the process's first step is slow, and no checkpoint was measured yet.
    assert left(41, 9.0) == pytest.approx(59 * 9)
    assert left(42, 0.5) == pytest.approx(58 * 0.5)
    assert left(43, 1.5) == pytest.approx(57 * 1.0)
    with seen.stop():
        now = 4.0
    assert left(50, 1.0) == pytest.approx(50 * 1.0 + 2 * 4)  # at 75 and at 100
    seen.add([losses_of(2.0, [1.0])], [batch_of(0)], 1.0)
    assert seen.line(State(step=51), 1e-3, 1.0)["checkpoint_s"] == 4.0
    assert left(76, 1.0) == pytest.approx(24 * 1.0 + 4)
    assert left(100, 1.0) == 0
    for step in range(meter.LATEST_STEPS):
        soon = left(1 + step % 90, 2.0)
    assert soon == pytest.approx(90 * 2.0 + 4 * 4), "the pace of long ago is forgotten"


def test_time_left_goes_on_after_a_restart_without_the_pause(tmp_path, shards, monkeypatch):
    recipe = toy_recipe(tmp_path / "run", shards=shards, train={"log_every": 1})
    with monkeypatch.context() as patch:
        crash_after(patch, 2 * 6 + 1)
        with pytest.raises(ConnectionError):
            launch.train(recipe, Silent())
    launch.train(recipe, Silent())
    metrics = read_metrics(recipe.run)
    of_steps = [8 * recipe.sentence_tokens / line["tokens_per_s"] for line in metrics]
    assert [line["seconds"] for line in metrics] == pytest.approx(np.cumsum(of_steps), abs=0.02), "steps and nothing else"
    assert metrics[4]["eta_s"] == pytest.approx(3 * of_steps[4], abs=0.06)  # the first line after the restart
    assert metrics[7]["eta_s"] == 0


# The rate of the machine


def test_operations_are_those_of_the_estimate_and_a_third_for_a_teacher():
    section, codebook = ModelSection(width=32, layers=2, heads=2, mlp=64), torch.randn(64, 5)
    model = build(section, codebook, 32, 4, seed=0)
    alone = meter.operations_per_token(model, [], 32)
    assert alone == estimate.operations_per_token(section, 64, 32)
    assert meter.operations_per_token(model, [model], 32) == pytest.approx(alone * 4 / 3)


def test_the_rate_of_matrix_products_is_measured_once_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(meter, "MATMUL_SECONDS", 0.02)
    monkeypatch.setitem(meter.MATMUL_SIDE, "cpu", 256)
    meter._own_matmul_rate.cache_clear()
    state = torch.get_rng_state()
    started = time.perf_counter()
    rates = [meter.matmul_rate("fp32", torch.device("cpu")) for _ in range(2)]
    assert time.perf_counter() - started < 2
    assert 1e8 < rates[0] < 1e14 and rates[0] == rates[1]
    assert torch.equal(torch.get_rng_state(), state)
    meter._own_matmul_rate.cache_clear()


def test_a_run_reaches_a_part_of_the_matmul_rate_and_its_measurement_is_no_training_time(tmp_path, shards, monkeypatch):
    slow, clock = [], time.perf_counter

    def rate(precision, device):
        slow.append((precision, device.type))
        return 1e12

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(slow))
    monkeypatch.setattr("lvm_ray.train.loop.matmul_rate", rate)
    run = launch.train(toy_recipe(tmp_path / "run", shards=shards, train={"steps": 2, "log_every": 1}), Silent())
    assert slow == [("fp32", "cpu")]
    metrics = read_metrics(run)
    assert all(0 < line["matmul_share"] < 1 for line in metrics)
    assert metrics[-1]["seconds"] < 500


# Reading


def test_the_newest_whole_line_is_read_from_the_end(tmp_path):
    assert last_line(tmp_path) is None and read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1')
    assert last_line(tmp_path) is None and read_metrics(tmp_path) == []
    path.write_text("".join(json.dumps({"step": step, "fill": "x" * 500}) + "\n" for step in range(1000)) + '{"step": 1000')
    assert last_line(tmp_path)["step"] == 999
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1000))
    cut_metrics(tmp_path, 10)
    assert last_line(tmp_path)["step"] == 10 and len(read_metrics(tmp_path)) == 11


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        read_metrics(tmp_path)


def test_reading_needs_no_torch():
    script = "import sys; import lvm_ray.train.meter; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


# The terminal


def test_the_bar_shows_loss_speed_and_share_and_takes_over_the_time_left(tmp_path, monkeypatch):
    bar = Bar("train", 100, "steps")
    line = {"step": 40, "loss": 2.3451, "tokens_per_s": 12300.4, "matmul_share": 0.4119, "eta_s": 90.0}
    with launch._watched(tmp_path, bar):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert bar.note == "loss 2.345 · 12,300 tokens/s · 41 % of matmul"
    assert bar.done == 40 and bar.seconds_left() == pytest.approx(90, abs=1)
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert bar.seconds_left() == pytest.approx(30, abs=1)


# The profile


def test_a_profile_is_written_once_and_leaves_the_losses(tmp_path, shards, capsys):
    plain = launch.train(toy_recipe(tmp_path / "plain", shards=shards, train={"log_every": 1}), Silent())
    changes = {"compute": {"profile": True}, "train": {"log_every": 1}}
    run = launch.train(toy_recipe(tmp_path / "run", shards=shards, **changes), Silent())
    assert journal(run) == journal(plain)
    assert not (plain / "profile").exists()
    trace = json.loads(gzip.decompress((run / "profile" / "trace-rank0.json.gz").read_bytes()))
    named = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")]
    assert sorted({name for name in named}) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]
    table = (run / "profile" / "operations.txt").read_text()
    assert "aten::" in table and "Self CPU" in table
    assert capsys.readouterr().out.count(f"{run}/profile/operations.txt") == 1
