"""docs/scale.md says what its arithmetic gives, and where a simulation and a formula know the same thing they agree."""

import json
import math
import re
from statistics import NormalDist, fmean

import numpy as np
import pytest

from lvm_ray import estimate
from lvm_ray.storage import join, read_bytes, write_file
from tests.scale import charts, data, data_tables, measure, page, simulate, store, training, training_tables, workload
from tests.scale.inputs import INPUTS, MEASURED, ROOT, measured, measurements, value
from tests.scale.workload import GPUS

TEXT = page.PAGE.read_text(encoding="utf-8")


# The page.


@pytest.mark.parametrize("name", page.TABLES)
def test_a_table_of_the_page_is_what_it_is_computed_from(name):
    assert page.written(TEXT, name) == page.TABLES[name](), "run make scale"


@pytest.mark.parametrize("name", charts.CHARTS)
def test_a_picture_of_the_page_is_what_it_is_computed_from(name):
    assert (charts.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == charts.CHARTS[name](), "run make scale"
    assert f"scale/{name}.svg" in TEXT


def test_every_mark_of_the_page_has_its_table():
    assert set(re.findall(r"<!-- scale (\w+) -->", TEXT)) == set(page.TABLES)


def test_code_that_the_page_names_exists():
    for path, name in re.findall(r"`(lvm_ray/[\w/]+\.py):(\w+)`", TEXT):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} has no {name}"


def test_every_measurement_is_of_a_function_that_measures_it():
    assert measurements().keys() == measure.MEASUREMENTS.keys()
    assert all(one.source for one in INPUTS.values())


# The formulas against the project and against libraries.


def test_the_tokenizer_computes_as_much_as_its_layers_do():
    import torch
    from diffusers import VQModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, picture = VQModel(**data.PUBLISHED), torch.zeros(1, 3, workload.SIZE, workload.SIZE)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            latents = network.encode(picture).latents
    places = latents.shape[-1] ** 2
    nearest = 2 * places * latents.shape[1] * data.PUBLISHED["num_vq_embeddings"]
    assert places == workload.image_tokens()
    assert data.encoder_operations() == pytest.approx(counter.get_total_flops() + nearest, rel=1e-6)


@pytest.mark.parametrize("gpus", GPUS)
def test_a_step_is_that_of_zero_1_and_of_the_recipe(gpus):
    teacher, student = workload.runs(gpus)
    assert (teacher.model.width, student.model.width, teacher.train.zero) == (2048, 768, 1)
    one = training.step(teacher, gpus)
    assert one.compute + one.gradients + one.weights == pytest.approx(training.zero_step("1b", gpus, 1, False, 4))
    later = training.step(teacher, gpus, changed=True)
    assert later.compute + later.gradients + later.weights == pytest.approx(training.zero_step("1b", gpus, 1, True, 4))
    assert teacher.train.batch == gpus * teacher.train.micro_batch * round(teacher.train.batch / gpus / teacher.train.micro_batch)


def test_gradients_wait_for_the_backward_pass_as_the_page_says():
    from lvm_ray.train.engine import deepspeed_config

    teacher, _ = workload.runs(8)
    assert deepspeed_config(teacher.train, 1, "bf16", 1)["zero_optimization"]["overlap_comm"] is False


def test_a_line_of_the_journal_takes_as_many_sums_as_the_page_counts(tmp_path, monkeypatch):
    import torch

    from lvm_ray.train.checkpoint import State
    from tests.test_meter import batch_of, losses_of, meter_of

    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", sums.append)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    seen = meter_of(tmp_path)
    seen.add([losses_of(2.0, [1.0, 3.0])], [batch_of(0, 1)], 0.5)
    seen.line(State(step=1), rate=1e-3, norm=0.25)
    assert len(sums) == training.SUMS


def test_a_cache_is_as_large_as_the_dry_run_says():
    teacher, student = workload.runs(8)
    recipe = student.model_copy(update={"distill": student.distill.model_copy(update={"cache": "answers"})})
    (line,) = [
        line for line in estimate.describe(recipe, {"teacher": teacher, "student": recipe}).splitlines() if "answers of" in line
    ]
    assert estimate.size_text(training.answers(sparse=False).of_sentence) in line


def test_a_dry_run_counts_the_teacher_that_a_student_asks():
    teacher, student = workload.runs(8)
    text = estimate.describe(student, {"teacher": teacher, "student": student})
    own, asked = (float(found) for found in re.findall(r"([\d.e+]+) GPU-hours on an A100", text))
    operations = [workload.operations(teacher), workload.operations(student, teacher)]
    assert asked / own == pytest.approx(operations[1] / operations[0], rel=0.01)


def test_bytes_of_a_token_are_those_of_the_benchmarks():
    row = re.search(r"`bytes_per_token` \| ([\d.]+) bytes", (ROOT / "docs" / "benchmarks.md").read_text())
    assert value("bytes_per_token") == pytest.approx(float(row[1]), rel=0.02)


# Simulations against formulas.


@pytest.mark.parametrize("between", [3600.0, 20_000.0])
@pytest.mark.parametrize("interval", [300.0, 1200.0])
def test_failures_cost_what_daly_says(between, interval):
    work, save, restart = 48_000.0, 30.0, 200.0
    rng = np.random.default_rng(0)
    found = fmean(simulate.run_with_failures(work, interval, save, restart, between, rng) for _ in range(600))
    assert found == pytest.approx(training.expected_seconds(work, interval, save, restart, between), rel=0.02)


def test_no_interval_is_better_than_youngs():
    save, restart, between = 10.0, 200.0, 20_000.0
    best = training.young(save, between)
    cost = {factor: training.expected_seconds(1e6, factor * best, save, restart, between) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)}
    assert cost[1.0] == pytest.approx(min(cost.values()), rel=1e-3)
    simulated = {}
    for factor in (0.2, 1.0, 5.0):
        rng = np.random.default_rng(1)
        simulated[factor] = fmean(simulate.run_with_failures(2e5, factor * best, save, restart, between, rng) for _ in range(200))
    assert simulated[1.0] == min(simulated.values())


def test_a_notice_saves_the_work_that_a_failure_loses():
    rng = np.random.default_rng(2)
    setting = 1e5, 2000.0, 5.0, 100.0, 5000.0
    lost, saved = (fmean(simulate.run_with_failures(*setting, rng, noticed) for _ in range(200)) for noticed in (False, True))
    failures = saved / setting[4]
    assert saved < lost and saved == pytest.approx(setting[0] + 50 * 5 + failures * 105, rel=0.03)


def test_units_drain_as_order_statistics_say():
    assert simulate.drain([1.0] * 40, 8) == 5.0
    actors, each = 64, 20
    rng = np.random.default_rng(3)
    found = fmean(simulate.drain(rng.exponential(1.0, actors * each), actors) for _ in range(100))
    last = sum(1 / k for k in range(1, actors + 1))  # all actors are busy with their last unit
    assert found == pytest.approx(each - 1 + last, rel=0.01)


def test_units_of_any_length_drain_within_grahams_bound():
    times = simulate.unit_times(2000, np.random.default_rng(4))
    assert times.mean() == pytest.approx(1, rel=0.1) and times.max() > 5
    even, found = times.sum() / 100, simulate.drain(times, 100)
    assert even <= found <= even + times.max() * (1 - 1 / 100)


@pytest.mark.parametrize(("readers", "limit"), [(8, 1e9), (500, 1e9), (500, 2000.0), (4, 2000.0)])
def test_requests_come_at_the_rate_that_readers_or_the_store_allow(readers, limit):
    rng = np.random.default_rng(5)
    rate = simulate.request_rate(readers, lambda: float(rng.lognormal(math.log(0.03) - 0.125, 0.5)), limit, 200 * readers + 4000)
    assert rate == pytest.approx(min(readers / 0.03, limit), rel=0.04)


@pytest.mark.parametrize("gpus", GPUS)
def test_the_slowest_of_many_is_as_slow_as_blom_says(gpus):
    spread = 0.05
    found = simulate.slowest(gpus, spread, 2000, np.random.default_rng(6))
    assert found == pytest.approx(math.exp(spread * NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))), rel=0.005)


@pytest.mark.parametrize("layers", [1, 12, 22])
@pytest.mark.parametrize("sending", [0.1, 1.0, 5.0])
def test_gpu_and_wire_overlap_as_the_formulas_say(layers, sending):
    forward, backward = 1.0, 2.0
    of_all = simulate.micro_batch(layers, forward / layers, backward / layers, 0.0, sending / layers, overlapped=False)
    assert of_all == pytest.approx(forward + backward + sending)
    beside = simulate.micro_batch(layers, forward / layers, backward / layers, 0.0, sending / layers, overlapped=True)
    assert beside == pytest.approx(forward + training.overlapped(layers, backward, sending / layers))
    assert max(forward + backward, sending) <= beside <= of_all + 1e-9


@pytest.mark.parametrize("layers", [12, 22])
@pytest.mark.parametrize("gathered", [0.1, 0.9, 1.5, 5.0])
def test_zero_3_overlaps_as_the_formula_says(layers, gathered):
    each = gathered / layers
    shape = layers, 1.0 / layers, 2.0 / layers, each, each
    assert simulate.micro_batch(*shape, overlapped=False) == pytest.approx(training.zero_3_pass(layers, 1.0, 2.0, each, False))
    found, formula = simulate.micro_batch(*shape, overlapped=True), training.zero_3_pass(layers, 1.0, 2.0, each, True)
    assert found <= formula + 1e-9 and formula - found <= 2 * each  # the wire has less to carry beside the first layer


def test_the_simulations_of_the_page_agree_with_its_formulas():
    for _, simulated, formula in data_tables.request_rates():
        assert simulated == pytest.approx(formula, rel=0.1)
    teacher, _ = workload.runs(512)
    between = training.mtbf(512, "spot, rough")
    save, restart = training.checkpoint_seconds(teacher, 512), training.restart_seconds(teacher, 512)
    simulated, formula = training_tables.throughput(training.young(save, between), save, restart, between)
    assert simulated == pytest.approx(formula, rel=0.02)


# The store that counts requests.


def test_the_stand_in_for_an_object_store_gives_back_what_it_got():
    with store.running() as stand_in:
        folder = join(stand_in.uri, "run")
        write_file(folder, "a/b.bin", b"hello")
        assert stand_in.objects["run/a/b.bin"] == b"hello"
        assert read_bytes(join(folder, "a/b.bin"), 1, 3) == b"ell"


@pytest.mark.parametrize("name", ["write_requests", "read_requests", "header_requests"])
def test_files_take_as_many_requests_as_the_page_says(name):
    assert measure.MEASUREMENTS[name]()[0] == pytest.approx(measured(name), rel=0.01), f"run python -m tests.scale.measure {name}"


def test_measurements_are_kept_as_json_with_machine_and_date():
    for one in json.loads(MEASURED.read_text()).values():
        assert one.keys() == {"value", "unit", "how", "machine", "date"}
