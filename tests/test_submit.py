"""A verb sent elsewhere: what is sent, what is refused, and that it arrives: at a real Ray head with a job server and a token.

There is no Kubernetes and no Slurm here: `kubectl`, `sbatch`, `squeue` and `scancel` are small programs on the PATH that keep
what they were given and answer as the real ones do.
"""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from lvm_ray import cli, config
from lvm_ray.cluster import arrival, dashboard, folder, kubernetes, package, sending, submission, verbs
from lvm_ray.cluster.submission import Submission, Where
from lvm_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECRET = "a1b2c3-the-token-of-nobody"
AT_ONCE = 15.0  # seconds


def write_recipe(folder: Path, run: object, pairs: int = 8) -> Path:
    """A recipe whose embedded data set has so many pairs."""
    place = "{run}/data/source/train/segmentation"
    path = folder / "drawn.yaml"
    path.write_text(
        f"run: {run}\nsize: 32\nsynth: {{train: {{segmentation: {pairs}}}}}\n"
        f"tasks:\n  segmentation:\n    classes: [disk, box, triangle]\n"
        f'    train: {{images: "{place}/images", masks: "{place}/masks"}}\ncompute: {{workers: 0}}\n'
    )
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that is refused, within seconds."""
    capsys.readouterr()
    began = time.monotonic()
    assert cli.main(list(arguments)) == 2
    assert time.monotonic() - began < AT_ONCE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and SECRET not in lines[0], lines
    return lines[0]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that does what it should."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0, capsys.readouterr()
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err
    return output.out


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's own; the package that is tested is the one that children import."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", arrival.JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LVM_RAY_HOME", str(tmp_path / "lvm-ray"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    dashboard._entered.cache_clear()


# What is sent


@pytest.mark.parametrize(
    ("run", "verb", "begins"),
    [
        ("s3://bucket/runs/Demo_1?region=us-east-1", "train", "demo-1-train-"),
        ("/shared/runs/demo", "tokenize", "demo-tokenize-"),
        ("s3://bucket/2024", "train", "run-2024-train-"),
        ("/shared/" + "long" * 40, "evaluate", "longlong"),
        ("/shared/ünï", "train", "n-train-"),
    ],
)
def test_a_job_is_named_after_its_run_and_its_verb(run: str, verb: str, begins: str) -> None:
    name = submission.job_name(run, verb)
    assert name.startswith(begins)
    assert submission.NAME.fullmatch(name) and len(name) <= submission.LONGEST and name[0].isalpha()
    assert name == submission.job_name(run, verb) != submission.job_name(run + "2", verb)


def test_two_runs_of_one_name_in_two_places_are_two_jobs() -> None:
    assert submission.job_name("s3://mine/demo", "train") != submission.job_name("s3://yours/demo", "train")
    assert submission.job_name("s3://mine/demo/", "train") == submission.job_name("s3://mine/demo", "train")


@pytest.mark.parametrize("name", ["Demo", "demo_1", "-demo", "demo-", "a" * 64, "", "demo train"])
def test_a_name_that_no_target_takes_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="small letters"):
        submission.checked_name(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "r.yaml", "--only", "teacher", "--set", "train.steps=3", "--set", "compute.workers=[1, 4]", "--run", "/x"],
        ["tune", "--space", "space.py", "r.yaml"],
        ["report", "/shared/a", "/shared/b", "--format", "md"],
        ["study", "/shared/a", "--over", "evaluate.votes=[1, 3]", "--split", "test"],
        ["train", "r.yaml", "--set=-x=1", "--init", "/shared/a b's/run"],
        ["tokenize", "r.yaml"],
    ],
)
def test_a_verbs_arguments_are_read_again_as_they_were(arguments: list[str]) -> None:
    def values(words: list[str]) -> dict[str, object]:
        return {key: value for key, value in vars(cli._parser().parse_args(words)).items() if key != "parser"}

    options = cli._parser().parse_args(arguments)
    assert values([options.verb, *sending.words(options)]) == values(arguments)


def test_a_shell_reads_the_entrypoint_as_the_arguments_that_it_was_made_of() -> None:
    arguments = ("train", "my recipe.yaml", "--set", "tasks.x.train.images=/a/$HOME/`x`; rm 'b'", "--run", "s3://b/x?a=1&b=2")
    printer = 'import sys; print("\\0".join(sys.argv[1:]), end="")'
    command = Submission("one", arguments).entrypoint.removeprefix("python -m lvm_ray ")
    shell = ["sh", "-c", f"exec {sys.executable} -c '{printer}' {command}"]
    assert tuple(subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")) == arguments


def test_what_is_sent_has_one_fingerprint_and_anything_else_another() -> None:
    wheel = package.Package("a.whl", b"")
    one = Submission("one", ("train", "r.yaml"), {"r.yaml": b"run: /x"}, wheel)
    others = [
        Submission("one", ("train", "r.yaml", "--only", "teacher"), {"r.yaml": b"run: /x"}, wheel),
        Submission("one", ("train", "r.yaml"), {"r.yaml": b"run: /y"}, wheel),
        Submission("one", ("train", "r.yaml"), {"r.yaml": b"run: /x"}, package.Package("b.whl", b"")),
    ]
    assert len({found.fingerprint for found in (one, *others)}) == 4
    assert Submission("two", ("train", "r.yaml"), {"r.yaml": b"run: /x"}, wheel).fingerprint == one.fingerprint


def test_every_relative_place_of_a_recipe_is_found() -> None:
    demo, photos = (config.load(str(ROOT / "recipes" / name)) for name in ("demo.yaml", "photos.yaml"))
    assert submission.places(demo, "demo")["run"] == "runs/demo"
    assert submission.places(demo, "tokenize")["tasks.pose.train.annotations"].startswith("runs/demo/data/source")
    assert submission.places(photos, "evaluate")["tasks.derain.test.rainy"] == "../shared/data/rain100L/rainy"
    assert not any(word in key for key in submission.places(photos, "demo") for word in ("format", "classes", "people"))
    assert submission.places(photos, "train") == {"run": "runs/photos"}, "training looks at no picture"
    settings = ["distill.also={second: {teacher: runs/a, cache: runs/b}}", "model.init=x", "distill.layers=null"]
    found = submission.places(config.load(str(ROOT / "recipes" / "demo.yaml"), settings), "train")
    expected = {"distill.also.second.teacher": "runs/a", "distill.also.second.cache": "runs/b", "model.init": "x"}
    assert expected.items() <= found.items()


def test_relative_places_stay_here_and_do_not_go_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    demo, photos = str(ROOT / "recipes" / "demo.yaml"), str(ROOT / "recipes" / "photos.yaml")
    bare = ["--set", "distill.layers=null"]
    line = refused(capsys, "submit", "--to", "ray", "train", demo)
    assert "run: runs/demo is relative" in line and "s3://" in line
    assert "tasks.segmentation.train.images" in refused(capsys, "submit", "--to", "ray", "tokenize", photos, "--run", "/shared/x")
    assert "RUN: runs/x" in refused(capsys, "submit", "--to", "ray", "study", "runs/x")
    started = ["train", demo, "--run", "/shared/x", "--init", "runs/old", *bare]
    assert "model.init: runs/old is relative" in refused(capsys, "submit", "--to", "slurm", *started)
    assert "runs/demo" in printed(capsys, "submit", "--to", "local", "train", demo, "--dry-run")


def test_a_verbs_arguments_are_checked_before_anything_is_sent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = str(ROOT / "recipes" / "demo.yaml")
    submit = ["submit", "--to", "ray", "--address", "http://127.0.0.1:9", "train", demo, "--run", "s3://bucket/demo"]
    assert "did you mean 'steps'" in refused(capsys, *submit, "--set", "train.stesp=3")
    assert "no teacher section" in refused(capsys, *submit, "--only", "student", "--set", "teacher=null", "--set", "distill=null")
    space = tmp_path / "space.py"
    space.write_text("space = 3\n")
    assert "space.py" in refused(capsys, *submit[:5], "tune", demo, "--run", "s3://bucket/demo", "--space", str(space))
    for wrong, words in (
        (["train", demo, "--onyl", "teacher"], "--onyl"),
        (["predict", "runs/demo"], "'predict'"),
        (["train", demo, "--only", "nobody"], "nobody"),
        ([], "missing"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(["submit", "--to", "ray", *wrong])
        assert error.value.code == 2 and words in capsys.readouterr().err


def test_credentials_are_sent_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(ROOT / "recipes" / "demo.yaml")
    for more in (["--run", f"s3://key:{SECRET}@bucket/x"], ["--set", f"shards=s3://bucket/x?secret_key={SECRET}"]):
        assert "credentials" in refused(capsys, "submit", "--to", "ray", "--dry-run", "train", demo, *more)
    assert "RAY_AUTH_TOKEN_PATH" in refused(capsys, "status", "--to", "ray", "--address", f"http://user:{SECRET}@127.0.0.1:8265")


@pytest.mark.parametrize("to", ["ray", "local", "slurm", "k8s"])
def test_a_dry_run_says_all_that_would_be_sent_and_what_it_would_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("PATH", "/nowhere")  # no kubectl, no sbatch: nobody is asked
    demo = str(ROOT / "recipes" / "demo.yaml")
    more = ["--template", str(write_ray_job(tmp_path))] if to == "k8s" else []
    placed = ["--set", "compute.device=cuda", "--set", "placement.train.labels.pool=gpu"]
    command = ["train", demo, "--only", "teacher", *placed, "--run", "s3://bucket/demo"]
    text = printed(capsys, "submit", "--to", to, *more, *command, "--dry-run")
    sent = next(yaml.safe_load_all(text.split("\nrun: s3://")[0]))
    recipe = demo if to == "local" else "demo.yaml"
    entrypoint = f"python -m lvm_ray train {recipe} {' '.join(placed)} --run s3://bucket/demo --only teacher"
    if to == "k8s":
        job, data = sent["manifests"]
        assert job["spec"]["entrypoint"] == entrypoint
        assert sorted(data["binaryData"])[0].startswith("lvm_ray-0.1.0-1")
        assert job["metadata"]["name"] == data["metadata"]["name"]
    else:
        assert sent["entrypoint"] == entrypoint
        assert submission.NAME.fullmatch(sent["submission_id"])
    if to == "ray":
        assert sent["to"] == "http://127.0.0.1:8265/api/jobs/"
        assert sent["runtime_env"]["py_modules"][0].startswith("gcs://lvm_ray-0.1.0-1")
        assert set(sent["runtime_env"]["env_vars"]) == {"LVM_RAY_JOB", "RAY_JOB_STOP_WAIT_TIME_S"}
        assert len(sent["uploads"]) == 2 and all(size.endswith(" bytes") for size in sent["uploads"].values())
    if to == "slurm":
        assert sent["command"].startswith("sbatch --parsable --job-name=demo-train-") and "job.sh" in sent["command"]
    assert sent["resources"] == ["driver: reserves nothing", "train: 2 workers of 1 CPU, 1 GPU each; on nodes with pool: gpu"]
    for words in ("parameters", "tokens a step", "GPU-hours", "of memory a worker", "strategy: augment"):
        assert words in text
    assert not (tmp_path / "lvm-ray").exists()


def test_of_a_sweep_the_space_file_travels_and_its_trainings_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    demo, space = str(ROOT / "recipes" / "demo.yaml"), str(ROOT / "tune_spaces" / "kd_temperature.py")
    text = printed(capsys, "submit", "--dry-run", "--to", "ray", "tune", demo, "--space", space, "--run", "/shared/demo")
    assert "tune demo.yaml --run /shared/demo --space kd_temperature.py" in text
    assert "kd_temperature: " in text and "trainings" in text


def test_the_manifest_that_comes_with_the_package_is_a_rayjob_for_kubernetes_when_it_is_filled_in() -> None:
    schema_file = ROOT.parent / "shared" / "schemas" / "ray.io_rayjobs.yaml"
    if not schema_file.is_file():
        pytest.skip(f"KubeRay's schemas are not here: {schema_file}")
    import jsonschema

    one = Submission("demo-train-1a2b3c", ("train", "demo.yaml"), {"demo.yaml": b"run: /x"}, package.wheel())
    where = Where("k8s", namespace="vision", image="mine/lvm-ray:2")
    job, data = kubernetes.described(where, one)["manifests"]
    versions = yaml.safe_load(schema_file.read_text())["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    jsonschema.validate(job, schema)
    assert job["spec"]["jobId"] == job["metadata"]["name"] == data["metadata"]["name"]
    for pod in [*kubernetes._pods(job["spec"]), *kubernetes._submitters(job["spec"])]:
        names = [volume["name"] for volume in pod["volumes"]]
        assert len(names) == len(set(names)) and {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= set(names)
        assert pod["containers"][0]["image"] == "mine/lvm-ray:2"
    assert "example.com" not in yaml.safe_dump(job)


# The package


def test_the_same_code_is_the_same_wheel_and_other_code_another(tmp_path: Path) -> None:
    def make(where: str, text: str) -> package.Package:
        place = tmp_path / where
        (place / "part" / "__pycache__").mkdir(parents=True)
        (place / "__init__.py").write_text(text)
        (place / "part" / "words.html").write_text("<p>")
        (place / "part" / "__pycache__" / "x.pyc").write_bytes(os.urandom(8))
        (place / ".hidden").write_bytes(os.urandom(8))
        return package.make_wheel(place, "1.2")

    first = make("a", "x = 1\n")
    time.sleep(0.01)
    assert make("b", "x = 1\n") == first
    other = make("c", "x = 2\n")
    assert other.name != first.name
    names = zipfile.ZipFile(io.BytesIO(first.content)).namelist()
    assert sorted(names) == names and "lvm_ray/part/words.html" in names
    assert not any("pyc" in name or "hidden" in name for name in names)


def test_data_in_the_packages_folder_does_not_travel(tmp_path: Path) -> None:
    (tmp_path / "photos.bin").write_bytes(bytes(package.LARGEST + 1))
    with pytest.raises(UserError, match=r"photos\.bin.*keep data out"):
        package.make_wheel(tmp_path, "1.2")


def test_the_wheel_is_small_and_runs_and_pip_takes_it(tmp_path: Path) -> None:
    wheel = package.wheel()
    assert wheel == package.wheel() and len(wheel.content) < 1_000_000
    (tmp_path / wheel.name).write_bytes(wheel.content)
    # With pip, and, as Ray does, unpacked.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--target"]
    subprocess.run([*install, str(tmp_path / "pip"), str(tmp_path / wheel.name)], check=True)
    zipfile.ZipFile(tmp_path / wheel.name).extractall(tmp_path / "ray")
    code = "import lvm_ray, lvm_ray.report.page, lvm_ray.benchmarks as b; print(lvm_ray.__file__, len(b.names()))"
    for place in ("pip", "ray"):
        own = {**os.environ, "PYTHONPATH": str(tmp_path / place)}
        found = subprocess.run([sys.executable, "-c", code], env=own, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert found.stdout.startswith(str(tmp_path / place)) and int(found.stdout.split()[-1]) > 0
        assert list((tmp_path / place).glob("lvm_ray-0.1.0.dist-info/METADATA"))


def test_a_job_looks_for_every_requirement_of_the_project() -> None:
    modules = {"scikit-image": "skimage", "pillow": "PIL", "pyyaml": "yaml"}
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [name.split("[")[0].split(">")[0].split("=")[0] for name in named]
    assert sorted(modules.get(name, name) for name in names) == sorted(arrival.MODULES)
    assert arrival.missing_modules() == []


# Arriving


def job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a submitted job runs it."""
    own = {**os.environ, arrival.JOB: "one-synth", **environment}
    return subprocess.run([sys.executable, "-m", "lvm_ray", *arguments], env=own, capture_output=True, text=True, check=False)


def test_a_job_whose_run_cannot_be_written_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run in (f"file://{tmp_path}/file/run", f"{tmp_path}/file/run"):
        began = time.monotonic()
        found = job("synth", str(write_recipe(tmp_path, run)))
        assert found.returncode == 2 and time.monotonic() - began < AT_ONCE
        assert len(found.stderr.splitlines()) == 1 and "cannot write" in found.stderr and "--run" in found.stderr


def test_a_job_whose_storage_does_not_answer_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # that takes connections, and says nothing
        run = f"s3://bucket/demo?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http&region=us-east-1"
        began = time.monotonic()
        found = job("synth", str(write_recipe(tmp_path, f'"{run}"')), AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY=SECRET)
        assert found.returncode == 2 and time.monotonic() - began < AT_ONCE
        assert "does not answer" in found.stderr and len(found.stderr.splitlines()) == 1 and SECRET not in found.stderr


def test_a_python_without_the_requirements_says_which_and_what_to_do(tmp_path: Path) -> None:
    for part in ("__init__.py", "__main__.py", "errors.py"):
        (tmp_path / "lvm_ray" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "lvm_ray" / part).write_bytes((ROOT / "lvm_ray" / part).read_bytes())
    (tmp_path / "lvm_ray" / "cluster").mkdir()
    for part in ("__init__.py", "arrival.py"):
        (tmp_path / "lvm_ray" / "cluster" / part).write_bytes((ROOT / "lvm_ray" / "cluster" / part).read_bytes())
    own = {"PYTHONPATH": str(tmp_path), arrival.JOB: "one"}
    bare = [sys.executable, "-S", "-m", "lvm_ray", "train", "x.yaml"]  # -S: without the installed packages
    found = subprocess.run(bare, env=own, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert "lacks ray, torch, deepspeed" in found.stderr and "cluster/Dockerfile" in found.stderr


def test_why_a_job_failed_is_its_own_last_word() -> None:
    ours = "Running entrypoint\nlvm-ray train: x.yaml: train.steps: found 'many'\nsomething of Ray's\n"
    assert submission.reason_of(ours) == "x.yaml: train.steps: found 'many'"
    assert "cluster/Dockerfile" in submission.reason_of("/usr/bin/python: No module named lvm_ray\n")
    assert "cluster/Dockerfile" in submission.reason_of("sh: 1: python: not found\n")
    assert submission.reason_of("Killed\n") == "Killed" and verbs.reason_of("") == ""


# Clusters that are not what they should be


class Answering(http.server.BaseHTTPRequestHandler):
    """A dashboard, as far as `connect` asks it."""

    token: str | None
    version: str
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.asked.append((self.path, given))
        status = 200 if self.token is None or given == f"Bearer {self.token}" else 403 if given else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": self.version}).encode() if status == 200 else b"Unauthorized")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def answering(token: str | None = SECRET, version: str = "2.60.0") -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    asked: list[tuple[str, str | None]] = []
    handler = type("Handler", (Answering,), {"token": token, "version": version, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_cluster_that_lets_everybody_in_is_refused_and_never_sees_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    with answering(token=None) as (url, asked):
        line = refused(capsys, "status", "--to", "ray", "--address", url)
    assert "answers without a token" in line and "RAY_AUTH_MODE=token" in line
    assert asked == [("/api/version", None)]


def test_the_token_is_looked_for_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert dashboard.read_token() == (None, "")
    own = tmp_path / "home" / ".ray" / "auth_token"
    own.parent.mkdir(parents=True)
    own.write_text("of-home\n")
    assert dashboard.read_token() == ("of-home", str(own))
    named = tmp_path / "named"
    named.write_text("of-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert dashboard.read_token()[0] == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " of-environment ")
    assert dashboard.read_token() == ("of-environment", "RAY_AUTH_TOKEN")
    for wrong in ("two words", "ünïcode", "line\nbreak"):
        monkeypatch.setenv("RAY_AUTH_TOKEN", wrong)
        with pytest.raises(UserError, match="holds no token") as error:
            dashboard.read_token()
        assert wrong not in str(error.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    named.unlink()
    with pytest.raises(UserError, match="No such file"):
        dashboard.read_token()


def test_clusters_that_cannot_be_used_are_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering() as (url, _):
        assert "set RAY_AUTH_TOKEN_PATH" in refused(capsys, "status", "--to", "ray", "--address", url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        line = refused(capsys, "status", "--to", "ray", "--address", url)
        assert "refuses the token from RAY_AUTH_TOKEN" in line and "another's" not in line
        monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
        assert "jobs, ray" in printed(capsys, "status", "--to", "ray")
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with answering(version="2.9.1") as (url, _):
        line = refused(capsys, "status", "--to", "ray", "--address", url)
        assert "runs Ray 2.9.1" in line and "cluster/Dockerfile" in line
    for wrong in ("ray://head:10001", "http://", "http://head:none"):
        assert "give the dashboard's URL" in refused(capsys, "status", "--to", "ray", "--address", wrong)
    assert "ssh -L" in refused(capsys, "status", "--to", "ray", "--address", "http://127.0.0.1:9")


def test_a_host_that_never_answers_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = refused(capsys, "status", "--to", "ray", "--address", f"127.0.0.1:{server.getsockname()[1]}")
    assert "no Ray dashboard answers" in line and "ssh -L" in line


# Programs of other systems, played by scripts that keep what they are given


def play(folder: Path, name: str, script: str) -> None:
    """A program on the PATH: it keeps its arguments and its input in FOLDER/NAME.N.json, then the Python script goes on."""
    head = (
        f"#!{sys.executable}\nimport json, os, pathlib, sys\nplace = pathlib.Path({str(folder)!r})\n"
        f"number = len(list(place.glob('{name}.*.json')))\narguments = sys.argv[1:]\n"
        "text = '' if sys.stdin.isatty() else sys.stdin.read()\n"
        f"kept = {{'arguments': arguments, 'input': text, 'environment': dict(os.environ), 'folder': os.getcwd()}}\n"
        f"(place / f'{name}.{{number:03d}}.json').write_text(json.dumps(kept))\n"
    )
    program = folder / name
    program.write_text(head + script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def given(folder: Path, name: str) -> list[dict[str, object]]:
    """What a played program was given, call after call."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def write_ray_job(folder: Path, image: str = "mine/lvm-ray:1") -> Path:
    """A RayJob, as small as one can be; its anchors are those of the real one."""

    def pod(name: str, mounts: str, volumes: str) -> str:
        container = f"{{name: {name}, image: '{image}', volumeMounts: {mounts}}}"
        return f"{{template: {{spec: {{containers: [{container}], volumes: {volumes}}}}}}}"

    path = folder / "rayjob.yaml"
    path.write_text(
        "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: any, labels: {team: vision}}\nspec:\n  entrypoint: none\n"
        f"  rayClusterSpec:\n    headGroupSpec: {pod('head', '&mounts []', '&volumes []')}\n"
        f"    workerGroupSpecs: [{pod('worker', '*mounts', '*volumes')}]\n"
    )
    return path


KUBECTL = """
store = place / 'store.json'
objects = json.loads(store.read_text()) if store.is_file() else {}
verb = arguments[0]
if verb == 'apply':
    import yaml
    found = list(yaml.safe_load_all(text))
    for one in found:
        one['metadata']['uid'] = 'uid-' + one['metadata']['name']
        if one['kind'] == 'RayJob':
            one['status'] = {'jobStatus': 'RUNNING', 'jobDeploymentStatus': 'Running', 'startTime': '2026-01-02T03:04:05Z'}
        objects[one['kind'].lower() + '/' + one['metadata']['name']] = one
    print(json.dumps(found[0] if len(found) == 1 else {'kind': 'List', 'items': found}))
elif verb == 'get':
    jobs = [one for one in objects.values() if one['kind'] == 'RayJob']
    jobs = [one for one in jobs if arguments[2] in (one['metadata']['name'], '--ignore-not-found')]
    if arguments[2].startswith('--'):
        print(json.dumps({'items': jobs}))
    elif jobs:
        print(json.dumps(jobs[0]))
elif verb == 'logs':
    print('a line')
elif verb == 'delete':
    for name in arguments[1:3]:
        objects.pop(name, None)
store.write_text(json.dumps(objects))
"""


def test_a_job_goes_to_kubernetes_and_back(capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path) -> None:
    """kubectl is played by a script: no Kubernetes was asked."""
    play(programs, "kubectl", KUBECTL)
    recipe = str(write_recipe(tmp_path, "/shared/drawn"))
    submit = ["submit", "--to", "k8s", "--template", str(write_ray_job(tmp_path)), "synth", recipe]
    text = printed(capsys, *submit, "--image", "mine/other:2", "--namespace", "vision")
    name = submission.job_name("/shared/drawn", "synth")
    assert f"{name}: sent" in text and f"lvm-ray logs {name} --to k8s --namespace vision" in text
    calls = given(programs, "kubectl")
    assert all("--namespace=vision" in call["arguments"] for call in calls)
    job, data = (next(yaml.safe_load_all(call["input"])) for call in calls if call["arguments"][0] == "apply")
    assert job["metadata"]["name"] == job["spec"]["jobId"] == data["metadata"]["name"] == name
    assert job["metadata"]["labels"] == {"team": "vision"} and job["metadata"]["namespace"] == "vision"
    assert job["spec"]["entrypoint"] == "python -m lvm_ray synth drawn.yaml"
    [owner] = data["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": f"uid-{name}"}
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["env_vars"] == {arrival.JOB: name}
    for uri in (*environment["py_modules"], environment["working_dir"]):
        content = zipfile.ZipFile(io.BytesIO(base64.b64decode(data["binaryData"][uri.removeprefix("file:///submission/")])))
        assert {"lvm_ray/cli.py", "drawn.yaml"} & set(content.namelist())
    cluster = job["spec"]["rayClusterSpec"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]):
        assert pod["volumes"] == [{"name": "submission", "configMap": {"name": name}}]
        assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/submission"]
        assert pod["containers"][0]["image"] == "mine/other:2"
    there = ["--to", "k8s", "--namespace", "vision"]
    assert "running (since 2026-01-0" in printed(capsys, "status", name, *there)
    assert name in printed(capsys, "status", *there)
    assert printed(capsys, "logs", name, *there) == "a line\n"
    assert "running already" in printed(capsys, *submit, "--image", "mine/other:2", "--namespace", "vision")
    assert sum(call["arguments"][0] == "apply" for call in given(programs, "kubectl")) == 2
    printed(capsys, "stop", name, *there)
    assert "no such job" in refused(capsys, "status", name, *there)


def test_an_ended_job_of_kubernetes_is_replaced(capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path) -> None:
    """kubectl is played by a script: no Kubernetes was asked."""
    play(programs, "kubectl", KUBECTL)
    recipe = str(write_recipe(tmp_path, "/shared/drawn"))
    submit = ["submit", "--to", "k8s", "--template", str(write_ray_job(tmp_path)), "synth", recipe]
    printed(capsys, *submit)
    store = programs / "store.json"
    store.write_text(store.read_text().replace('"RUNNING"', '"FAILED"').replace('"Running"', '"Failed"'))
    assert "sent again" in printed(capsys, *submit)
    verbs_of = [call["arguments"][0] for call in given(programs, "kubectl")]
    assert verbs_of[-5:] == ["get", "delete", "get", "apply", "apply"]


def test_what_kubernetes_could_not_take_is_refused(
    capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl is played by a script, or missing."""
    recipe = str(write_recipe(tmp_path, "/shared/drawn"))
    submit = ["submit", "--to", "k8s", "--template", str(write_ray_job(tmp_path)), "synth", recipe]
    monkeypatch.setenv("PATH", str(programs))
    assert "kubectl: no such command" in refused(capsys, *submit)
    play(programs, "kubectl", "sys.exit('error: no context exists with the name: \"none\"')")
    assert "no context exists" in refused(capsys, *submit)
    play(programs, "kubectl", KUBECTL)
    assert "at most 47" in refused(capsys, *submit, "--name", "a" * 48)
    write_ray_job(tmp_path, "registry.example.com/lvm-ray:0.1.0")
    assert "--image: missing" in refused(capsys, *submit)
    (tmp_path / "rayjob.yaml").write_text("kind: Pod\n")
    assert "not one RayJob" in refused(capsys, *submit)
    large = Submission("one", ("train",), {}, package.Package("x.whl", bytes(2_000_000)))
    with pytest.raises(UserError, match="ConfigMap holds"):
        kubernetes.config_map(large, None)


SQUEUE = """
queue = place / 'queue'
name = next((word.removeprefix('--name=') for word in arguments if word.startswith('--name=')), None)
for line in queue.read_text().splitlines() if queue.is_file() else []:
    if name in (None, line.split('|')[0]):
        print(line)
"""
SBATCH = """
name = next(word.removeprefix('--job-name=') for word in arguments if word.startswith('--job-name='))
(place / 'queue').write_text(f'{name}|17|PENDING|Priority\\n')
print(17)
"""


def test_a_job_goes_to_slurm_and_back(capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path) -> None:
    """sbatch, squeue and scancel are played by scripts: no Slurm was asked. What would run on a node is run here."""
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", "(place / 'queue').unlink(missing_ok=True)")):
        play(programs, name, script)
    template = tmp_path / "job.sh"
    template.write_text("#!/bin/sh\n")
    recipe = write_recipe(tmp_path, tmp_path / "run")
    submit = ["submit", "--to", "slurm", "--template", str(template), "synth", str(recipe)]
    text = printed(capsys, *submit)
    name, there = submission.job_name(str(tmp_path / "run"), "synth"), ["--to", "slurm"]
    assert f"{name}: sent" in text
    [call] = given(programs, "sbatch")
    arguments, environment = call["arguments"], call["environment"]
    assert f"--job-name={name}" in arguments and "--dependency=singleton" in arguments
    place = folder.home() / name
    assert arguments[arguments.index(str(template)) + 1 :][-5:] == ["python", "-m", "lvm_ray", "synth", "drawn.yaml"]
    assert environment["PYTHONPATH"].startswith(str(place / "package")) and environment[arrival.JOB] == name
    assert call["folder"] == str(place / "files") and (place / "files" / "drawn.yaml").read_bytes() == recipe.read_bytes()
    assert (place / "package" / "lvm_ray" / "cli.py").is_file()
    assert f"{name}: waiting" in printed(capsys, "status", name, *there) and "Priority" in printed(capsys, "status", name, *there)
    assert "waiting already" in printed(capsys, *submit) and len(given(programs, "sbatch")) == 1

    # The batch script's part: the command, on a node, into the log.
    recipe.write_text("edited since\n")
    command = arguments[arguments.index(str(template)) + 1 :]
    assert environment["PATH"].startswith(f"{Path(sys.executable).parent}:"), "the environment need not be activated"
    with (place / "log").open("ab") as log:
        subprocess.run(command, env=environment, cwd=call["folder"], stdout=log, stderr=log, check=True)
    (programs / "queue").unlink()
    assert "succeeded, exit code 0" in printed(capsys, "status", name, *there)
    assert "synth" in printed(capsys, "logs", name, *there)
    assert str(place / "package") in folder.log(name), "the code that travelled"
    write_recipe(tmp_path, tmp_path / "run")
    assert "sent again" in printed(capsys, *submit)
    assert "stop" in printed(capsys, "stop", name, *there)
    assert given(programs, "scancel")[0]["arguments"] == ["17"], "out of the queue"
    (programs / "queue").write_text(f"{name}|18|RUNNING|node1\n")
    printed(capsys, "stop", name, *there)
    assert given(programs, "scancel")[1]["arguments"] == ["--batch", "--signal=TERM", "18"], "asked to save"


def test_without_slurm_nothing_is_sent(
    capsys: pytest.CaptureFixture[str], programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no squeue on the PATH."""
    monkeypatch.setenv("PATH", str(programs))
    template = tmp_path / "job.sh"
    template.write_text("#!/bin/sh\n")
    submit = ["submit", "--to", "slurm", "synth", str(write_recipe(tmp_path, "/shared/drawn")), "--template"]
    assert "squeue: no such command" in refused(capsys, *submit, str(template))
    play(programs, "squeue", SQUEUE)
    assert "no such batch script" in refused(capsys, *submit, str(tmp_path / "none.sh"))
    assert not folder.home().exists()


# In the background of this machine


def wait_for(found: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_verb_in_the_background_is_followed_resumed_and_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe, there = str(write_recipe(tmp_path, tmp_path / "run")), ["--to", "local"]
    name = submission.job_name(str(tmp_path / "run"), "synth")
    submit = ["submit", *there, "synth", recipe, "--follow"]
    text = printed(capsys, *submit)
    assert "8 pairs" in text and f"{name}: succeeded" in text and "Traceback" not in text
    assert (tmp_path / "run" / "data" / "source" / "synth.json").is_file()
    assert "succeeded, exit code 0" in printed(capsys, "status", name, *there)
    again = printed(capsys, *submit)
    assert "sent again" in again and "as before" in again
    assert again.count("8 pairs") == 1, "the log of the first time is not shown again"
    assert printed(capsys, "logs", name, *there).count("8 pairs") == 2

    long = ["submit", *there, "synth", recipe, "--set", "synth.train.segmentation=300000", "--name", "long"]
    assert "long: sent" in printed(capsys, *long)
    assert "long: running" in printed(capsys, "status", "long", *there)
    assert "running already" in printed(capsys, *long)
    assert "with other arguments" in refused(capsys, *long, "--set", "seed=3")
    pid = folder.number("long", "pid")
    assert pid is not None and psutil.Process(pid).cmdline()[-1] == "synth.train.segmentation=300000"
    printed(capsys, "stop", "long", *there)
    assert not psutil.pid_exists(pid)
    assert "long: stopped" in printed(capsys, "status", "long", *there)
    assert "no such job" in refused(capsys, "logs", "nobody", *there)
    assert {"long", name} <= set(printed(capsys, "status", *there).split())


def test_a_job_in_the_background_that_cannot_run_says_so_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may take longer over a verb's first checks than a person is let wait for them.
    monkeypatch.setattr(verbs, "FIRST_CHECKS", AT_ONCE)
    monkeypatch.setitem(verbs.STARTS_WITHIN, "local", AT_ONCE)
    (tmp_path / "file").write_text("")
    recipe = str(write_recipe(tmp_path, tmp_path / "file" / "run"))
    line = refused(capsys, "submit", "--to", "local", "synth", recipe)
    assert "failed with exit code 2" in line and "cannot write" in line


def test_a_killed_job_in_the_background_is_no_running_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, tmp_path / "run", pairs=300_000))
    printed(capsys, "submit", "--to", "local", "synth", recipe, "--name", "killed")
    pid = folder.number("killed", "pid")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "exit code 137" in printed(capsys, "status", "killed", "--to", "local"))


# A real cluster


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A Ray head of its own on loopback, with a job server and a token: its dashboard's URL, and the file with the token."""
    place = Path(tempfile.mkdtemp(prefix="lvm-ray-", dir="/tmp"))  # sockets' paths are short
    token = place / "token"
    token.touch(0o600)
    token.write_text(SECRET)
    port = free_port()
    binaries = Path(sys.executable).parent
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"PATH": f"{binaries}:{own['PATH']}", "LVM_RAY_HOME": str(place / "lvm-ray"), "RAY_enable_worker_prestart": "0"}
    command = [str(binaries / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", f"--temp-dir={place}/ray"]
    command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    with (place / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:

        def answers() -> bool:
            assert process.poll() is None, (place / "head.log").read_text()[-2000:]
            try:
                return dashboard.ask(dashboard.Cluster(url, SECRET), "GET", "/api/jobs/", seconds=5)[0] == 200
            except UserError:
                return False

        wait_for(answers, 90)
        yield url, token
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for one in psutil.wait_procs(started, timeout=5)[1]:
            one.kill()
        subprocess.run(["rm", "-rf", str(place)], check=False)


def test_a_verb_is_sent_to_a_real_cluster_followed_resumed_and_stopped(
    head: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, token = head
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
    recipe, there = str(write_recipe(tmp_path, tmp_path / "run")), ["--to", "ray"]
    name = submission.job_name(str(tmp_path / "run"), "synth")
    submit = ["submit", *there, "synth", recipe, "--follow"]
    text = printed(capsys, *submit)
    assert "8 pairs" in text and f"{name}: succeeded" in text and "Traceback" not in text
    assert f"py_modules_files/{package.wheel().name}" in text, "the code that travelled, not what is installed there"
    assert (tmp_path / "run" / "data" / "source" / "synth.json").is_file()
    assert "succeeded, exit code 0" in printed(capsys, "status", name, *there)
    again = printed(capsys, *submit)
    assert "sent again" in again and "as before" in again and again.count("8 pairs") == 1
    assert printed(capsys, "logs", name, *there).count("8 pairs") == 2

    long = ["submit", *there, "synth", recipe, "--set", "synth.train.segmentation=300000", "--name", "long"]
    assert "long: sent" in printed(capsys, *long)
    assert "long: running" in printed(capsys, "status", "long", *there)
    assert "running already" in printed(capsys, *long)
    assert "with other arguments" in refused(capsys, *long, "--set", "seed=3")
    printed(capsys, "stop", "long", *there)
    assert "long: stopped" in printed(capsys, "status", "long", *there)
    assert {"long", name} <= set(printed(capsys, "status", *there).split())


def test_what_cannot_work_on_a_real_cluster_fails_at_once_with_what_to_do(
    head: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, token = head
    recipe = str(write_recipe(tmp_path, tmp_path / "run"))
    submit = ["submit", "--to", "ray", "--address", url, "synth", recipe, "--name", "never"]
    assert "there is none here" in refused(capsys, *submit)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert "refuses the token" in refused(capsys, *submit)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    wrong = [*submit[:4], f"http://127.0.0.1:{free_port()}", *submit[5:]]
    assert "no Ray dashboard answers (Connection refused)" in refused(capsys, *wrong)
    assert "no such job" in refused(capsys, "status", "never", "--to", "ray", "--address", url)
    (tmp_path / "file").write_text("")
    line = refused(capsys, *submit, "--run", f"file://{tmp_path}/file/run")
    assert "failed with exit code 2" in line and "cannot write" in line and "--run" in line
