"""What others see of a run: the same numbers as its journal has, each step once, whatever becomes of those who get them."""

import importlib.util
import json
import re
import socket
import struct
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import lvm_ray.tokenizer
from lvm_ray import config, ray_session
from lvm_ray.errors import UserError
from lvm_ray.observe import follow, prometheus, trackers
from lvm_ray.progress import Bar, stage
from lvm_ray.train import launch
from lvm_ray.train.meter import TAIL_BYTES, lines_after, read_metrics

from .nodes import on_nodes
from .toys import crash_after, journal, load_toy_tokenizer, toy_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def toy_tokenizer(monkeypatch):
    monkeypatch.setattr(lvm_ray.tokenizer, "load_tokenizer", load_toy_tokenizer)


@pytest.fixture
def nothing_shown(monkeypatch):
    """Prometheus as in a process that has shown nothing yet."""
    monkeypatch.setattr(prometheus, "_bars", {})
    monkeypatch.setattr(prometheus, "_lines", {})
    monkeypatch.setattr(prometheus, "_run", "")


def recipe_of(folder, shards, *names, **changes):
    train = {"log_every": 1, "checkpoint_every": 4} | changes.pop("train", {})
    return toy_recipe(folder, shards=shards, train=train, trackers=list(names), **changes)


def train(recipe):
    return launch.train(recipe, Bar("train", None, "steps"))


def train_with_a_crash(recipe, monkeypatch):
    """Lost in step 7 of 8: the same command goes on from step 4, so that steps 5 and 6 are computed twice."""
    with monkeypatch.context() as patch:
        crash_after(patch, 2 * 6 + 1)
        with pytest.raises(ConnectionError):
            train(recipe)
    assert [line["step"] for line in read_metrics(recipe.run)] == [1, 2, 3, 4, 5, 6]
    return train(recipe)


def line_of(step, **changes):
    return {
        "step": step,
        "loss": 2.5,
        "kd": None,
        "target_loss": {"pose": 1.25, "derain": None},
        "tokens_per_s": 1000.0,
        "matmul_share": 0.5,
        "checkpoint_s": None,
    } | changes


# The journal's end


@pytest.mark.parametrize("wide", [10, TAIL_BYTES // 20])
@pytest.mark.parametrize("last", [0, 1, 30, 59, 60, 100])
def test_lines_after_a_step_are_those_of_the_whole_journal(tmp_path, wide, last):
    lines = [{"step": step, "text": "x" * wide} for step in range(1, 61)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "te')
    assert lines_after(tmp_path, last) == lines[last:]
    assert lines_after(tmp_path / "nowhere", last) == []


# Prometheus


def test_a_stage_and_a_journal_become_numbers(nothing_shown):
    prometheus.name_run("runs/demo")
    with stage("tokenize", total=10, unit="pairs") as bar:
        bar.bad = 2
        bar.set(4, left=30.0)
        found = {(name, labels["stage"]): value for name, labels, value in prometheus.numbers()}
    assert found["lvm_ray_stage_eta_seconds", "tokenize"] == pytest.approx(30, abs=1)
    lines = prometheus.Journal("train student", last=0)
    lines.log(line_of(8, validation_loss={"pose": 1.5}, checkpoint_s=0.75))
    lines.log(line_of(9, loss=2.0))
    labels = {"run": "runs/demo", "stage": "tokenize"}
    training = {"run": "runs/demo", "stage": "train student"}
    assert list(prometheus.numbers()) == [
        ("lvm_ray_stage_done", labels, 4.0),
        ("lvm_ray_bad_items", labels, 2.0),
        ("lvm_ray_stage_total", labels, 10.0),
        ("lvm_ray_stage_eta_seconds", labels, 0.0),  # it is over
        ("lvm_ray_step", training, 9.0),
        ("lvm_ray_tokens_per_second", training, 1000.0),
        ("lvm_ray_matmul_share", training, 0.5),
        ("lvm_ray_loss", training, 2.0),
        ("lvm_ray_checkpoint_seconds", training, 0.75),
        ("lvm_ray_target_loss", training | {"task": "pose"}, 1.25),
        ("lvm_ray_validation_loss", training | {"task": "pose"}, 1.5),
    ]
    named = {name: labels for name, labels, _ in prometheus.numbers()}
    assert {name: tuple(labels) for name, labels in named.items()} == {
        name: keys for name, (_, keys) in prometheus.METRICS.items()
    }


def test_the_dashboard_shows_every_number_and_no_other():
    board = json.loads((ROOT / "cluster/grafana.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    assert {name for text in shown for name in re.findall(r"ray_(lvm_ray_\w+)", text)} == set(prometheus.METRICS)
    assert {name for text in asked for name in re.findall(r"ray_(lvm_ray_\w+)", text)} <= set(prometheus.METRICS)
    for text in shown:
        (labels,) = {prometheus.METRICS[name][1] for name in re.findall(r"ray_(lvm_ray_\w+)", text)}
        assert f"by ({', '.join(labels)})" in text
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) and board["title"] and board["uid"]


def test_links_are_those_of_the_cluster_and_of_the_job(monkeypatch):
    assert (
        ray_session.links("127.0.0.1:8265", "demo")
        == ": dashboard http://127.0.0.1:8265, this job http://127.0.0.1:8265/#/jobs/demo"
    )
    assert ray_session.links("https://ray.example.org", "x").startswith(": dashboard https://ray.example.org, this job https://")
    assert ray_session.links(None, "demo") == ray_session.links("", "demo") == ""
    submitted = {"runtime_env": {}, "metadata": {"job_submission_id": "demo-1", "job_name": "demo"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    assert ray_session._job() == "demo-1"


def exported_there(port):
    """What Prometheus reads of the head, once all of our numbers are among it, or after a while."""
    ray_session.start(1)
    prometheus.name_run("runs/demo")
    prometheus.Journal("train student", 0).log(line_of(8, validation_loss={"pose": 1.5}, checkpoint_s=0.75))
    with stage("tokenize", total=10, unit="pairs") as bar:
        bar.set(4, left=3000.0)
        for _ in range(45):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            if all(f"ray_{name}{{" in text for name in prometheus.METRICS):
                break
            time.sleep(1)
    return text


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ray_exports_every_number(tmp_path):
    for name in ("aiohttp", "prometheus_client", "opentelemetry.exporter.prometheus"):
        pytest.importorskip(name, reason="ray[default] is not installed: nodes export no metrics")
    port = free_port()
    with on_nodes([], METRICS_PORT=str(port)) as cluster:
        text = cluster.run(exported_there, port)
    for name, (_, labels) in prometheus.METRICS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"ray_{name}{{")]
        assert all(f'{label}="' in line for label in labels) and 'run="runs/demo"' in line
    (line,) = [line for line in text.splitlines() if line.startswith("ray_lvm_ray_target_loss{")]
    assert 'task="pose"' in line and line.endswith(" 1.25")


# Trackers


def test_a_line_and_a_recipe_are_told_by_paths(tmp_path):
    line = line_of(9, teachers={"big/one": {"kd": {"pose": 0.5, "swap": None}, "entropy": 1.0}})
    assert trackers.numbers(line) == {
        "loss": 2.5,
        "target_loss/pose": 1.25,
        "tokens_per_s": 1000.0,
        "matmul_share": 0.5,
        "teachers/big_one/kd/pose": 0.5,
        "teachers/big_one/entropy": 1.0,
    }
    found = trackers.settings(toy_recipe(tmp_path))
    assert found["train.steps"] == 8 and found["tasks.invert.train"] == 24 and "distill" not in found


def test_a_run_is_known_by_its_place_and_by_what_it_computes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, own = trackers.identity(toy_recipe("runs/demo/student"))
    assert name == "runs/demo/student"
    assert own == trackers.identity(toy_recipe(tmp_path / "runs/demo/student"))[1]
    assert own == trackers.identity(toy_recipe("runs/demo/student", compute={"workers": 2}, trackers=["mlflow"]))[1]
    others = [
        toy_recipe("runs/demo/teacher"),
        toy_recipe("runs/demo/student", seed=1),
        toy_recipe("s3://b/demo/student?region=x"),
    ]
    assert len({own, *(trackers.identity(other)[1] for other in others)}) == 4
    assert trackers.identity(others[2])[0] == "b/demo/student"
    assert re.fullmatch(r"[0-9a-f]{16}", own)


def test_what_a_tracker_lacks_is_said_before_anything_starts(tmp_path, shards, monkeypatch):
    with pytest.raises(UserError, match=r"trackers\.0: found 'neptune': input should be 'tensorboard', 'mlflow' or 'wandb'"):
        config.load(str(ROOT / "recipes/demo.yaml"), ["trackers=[neptune]"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^trackers: wandb: its package is not installed: pip install 'lvm-ray\[wandb\]', or "):
        train(recipe_of(tmp_path / "run", shards, "wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"^trackers: mlflow: no server: set MLFLOW_TRACKING_URI to its address, or "):
        train(recipe_of(tmp_path / "run", shards, "mlflow"))
    assert not (tmp_path / "run").exists()


def events(folder):
    """(step, name, value) of all scalars in a folder's event files, in order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def as_told(lines):
    """What a tracker should have of the journal's lines: {step: {name: number}}."""
    return {line["step"]: trackers.numbers(line) for line in lines}


def as_found(points):
    """The same of (step, name, value); a step that stands twice is an error."""
    found = {}
    for step, name, value in points:
        assert name not in found.setdefault(step, {}), f"{name} of step {step} stands twice"
        found[step][name] = value
    return found


def test_event_files_hold_the_journal_after_a_crash_too(tmp_path, shards, monkeypatch):
    run = train_with_a_crash(recipe_of(tmp_path / "run", shards, "tensorboard"), monkeypatch)
    found, told = as_found(events(run / "tensorboard")), as_told(read_metrics(run))
    assert list(found) == list(told) == [1, 2, 3, 4, 5, 6, 7, 8]
    for step, values in told.items():
        assert found[step] == pytest.approx(values, rel=1e-6)
    assert {"loss", "target_loss/invert", "validation_loss/swap", "validation"} <= found[8].keys()


def unmeasured(values):
    """Without what a clock says, which differs where a step was computed twice."""
    measured = ("seconds", "tokens_per_s", "matmul_share", "checkpoint_s", "eta_s")
    return {name: value for name, value in values.items() if name not in measured}


def test_a_run_in_mlflow_goes_on_where_it_was(tmp_path, shards, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: an extra")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    recipe = recipe_of(tmp_path / "run", shards, "mlflow")
    run = train_with_a_crash(recipe, monkeypatch)
    (experiment,) = [one for one in client.search_experiments() if one.name == "lvm-ray"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == trackers.identity(recipe)[0]
    assert found.data.params["train.steps"] == "8"
    points = [
        (point.step, name, point.value)
        for name in found.data.metrics
        for point in client.get_metric_history(found.info.run_id, name)
    ]
    kept, told = as_found(sorted(points)), as_told(read_metrics(run))
    assert list(kept) == list(told)
    for step in told:
        assert unmeasured(kept[step]) == pytest.approx(unmeasured(told[step]))


def log_records(content):
    """The records of W&B's file: after a header, pieces of them (checksum, length, kind) in blocks, as in a log of LevelDB."""
    block, header, whole, last = 2**15, 7, 1, 4
    place, record = header, b""
    while place + header <= len(content):
        if block - place % block < header:  # the rest of a block that is too short for a piece
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + header : place + header + length]
        place += header + length
        if kind in (whole, last):
            yield record
            record = b""


def test_a_run_in_wandb_goes_on_where_it_was(tmp_path, shards, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: an extra")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = recipe_of(tmp_path / "run", shards, "wandb")
    run = train_with_a_crash(recipe, monkeypatch)
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert folder.name.endswith(trackers.identity(recipe)[1])
    (file,), points = folder.glob("*.wandb"), []
    for content in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        points += [
            (record.history.step.num, "/".join(item.nested_key) or item.key, json.loads(item.value_json))
            for item in record.history.item
            if not (item.key or item.nested_key[0]).startswith("_")
        ]
    told = as_told(read_metrics(run))
    found = as_found(points)
    assert list(found) == list(told)
    for step, values in told.items():
        assert found[step] == pytest.approx(values)


def test_wandb_is_told_who_the_run_is(tmp_path, shards, monkeypatch):
    """On a stand-in, so that this is checked where wandb is not installed."""
    calls, logged = [], []
    run = SimpleNamespace(
        starting_step=7,
        log=lambda values, step: logged.append(step),
        finish=lambda exit_code: calls.append({"exit_code": exit_code}),
    )
    fake = ModuleType("wandb")
    fake.Settings = dict
    fake.init = lambda **settings: calls.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    recipe = recipe_of(tmp_path / "run", shards, "wandb")
    train(recipe)
    started, ended = calls
    name, own = trackers.identity(recipe)
    assert {key: started[key] for key in ("project", "id", "name", "resume", "dir")} == {
        "project": "lvm-ray",
        "id": own,
        "name": name,
        "resume": "allow",
        "dir": str(tmp_path / "run"),
    }
    assert started["config"]["train"]["steps"] == 8
    assert logged == [7, 8], "a server that has six steps gets the others"
    assert ended == {"exit_code": 0}


class Moody:
    """A tracker that fails as often as it is told to."""

    def __init__(self, moods):
        self.last, self.moods, self.steps, self.closed = 0, moods, [], []

    def opened(self):
        self._mood()
        return self

    def log(self, line):
        self._mood()
        self.steps.append(line["step"])

    def close(self, done):
        self.closed.append(done)
        self._mood()

    def _mood(self):
        if self.moods and self.moods.pop(0) == "bad":
            raise ConnectionError("no route\nto the server")


def test_what_a_tracker_missed_is_made_up_with_the_next_line(tmp_path, capsys):
    tracker = Moody(["bad", "good", "good", "bad"])  # opened in vain; opened, one line taken, one not; then all is well
    feed = follow._Feed(str(tmp_path), "mlflow", tracker.opened)
    feed.look()
    for step in (1, 2, 3):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line_of(step)) + "\n")
        feed.look()
        feed.look()  # nothing new: nothing is tried
    assert tracker.steps == [1, 2, 3] and tracker.moods == []
    feed.close(True)
    assert tracker.closed == [True]
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "warning: mlflow: no route to the server: training goes on without it" in out


def test_a_tracker_that_is_away_changes_nothing_of_a_training(tmp_path, shards, monkeypatch, capsys):
    away = Moody(["bad"] * 100)
    monkeypatch.setitem(trackers.OPEN, "mlflow", lambda recipe: away.opened())
    monkeypatch.setattr(trackers, "require", lambda recipe: "")
    plain = train(recipe_of(tmp_path / "plain", shards))
    run = train(recipe_of(tmp_path / "run", shards, "mlflow"))
    assert journal(run) == journal(plain)
    assert away.steps == away.closed == [] and len(away.moods) < 100
    assert capsys.readouterr().out.count("warning: mlflow") == 1
