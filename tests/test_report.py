"""The report page: charts as text, a whole folder as a page, hostile names, missing parts, and a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from lvm_ray.errors import UserError
from lvm_ray.report import charts, mixture, page, pictures, scores, sections, series, words
from lvm_ray.report.page import write_report

HOSTILE = "<img src=x onerror=alert(1)>.png"
FLOORS = {"segmentation": "all background", "pose": "mean pose", "derain": "the query median-filtered 3x3"}
# task -> metric -> (floor, teacher, student, ceiling, half an interval)
SCORES: dict[str, dict[str, tuple[float, float, float, float | None, float]]] = {
    "segmentation": {"miou": (0.112, 0.534, 0.471, 0.861, 0.031)},
    "pose": {"ap": (0.004, 0.118, 0.071, 0.704, 0.022), "pck": (0.212, 0.618, 0.547, 0.978, 0.035)},
    "derain": {"psnr_y": (20.71, 20.92, 20.43, 22.94, 0.41), "ssim_y": (0.611, 0.628, 0.604, 0.742, 0.018)},
}
SCORES = {
    task: scores | {"target_perplexity": (212.4, 17.8, 20.9, None, 1.6), "token_accuracy": (0.09, 0.381, 0.344, None, 0.014)}
    for task, scores in SCORES.items()
}


def evaluation(role: str) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, measured in SCORES.items():
        tasks[task] = {}
        for metric, (floor, teacher, student, ceiling, half) in sorted(measured.items()):
            value = teacher if role == "teacher" else student
            tasks[task][metric] = {
                "value": value,
                "ci95": [value - half, value + half],
                "n": 96,
                "floor": floor,
                "floor_name": "the training answers' code frequencies" if ceiling is None else FLOORS[task],
                "ceiling": ceiling,
                "progress": None if ceiling is None else (value - floor) / (ceiling - floor),
                "higher_is_better": metric != "target_perplexity",
            }
    return {"schema": 1, "tasks": tasks, "bad": {"pose": 2}, "examples": 3, "seed": 0}


def journal(tasks: tuple[str, ...], final: float, rng: np.random.Generator) -> str:
    lines: list[dict[str, Any]] = []
    for step in range(10, 401, 10):
        decay = np.exp(-step / 110)
        losses = {task: final + k * 0.35 + 3.2 * decay + rng.normal(0, 0.05) for k, task in enumerate(tasks)}
        lines.append(
            {"step": step, "rows": step * 8, "tokens": step * 4096, "loss": 3.0, "target_loss": losses, "seconds": step / 4}
        )
        lines[-1] |= {"tokens_per_s": 9600 + rng.normal(0, 300), "matmul_share": 0.41}
        if step % 100 == 0:
            lines[-1] |= {"validation_loss": {task: loss + 0.1 for task, loss in losses.items()}, "validation": 3.3}
    return "".join(json.dumps(line) + "\n" for line in lines)


def draw(task: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A query and its true answer, 64 x 64: shapes on a gradient, a figure of discs, a scene in the rain."""
    y, x = np.mgrid[0:64, 0:64] / 63
    scene = np.stack([90 + 80 * x, 110 + 60 * y, 150 - 50 * x * y], axis=2)
    truth = np.zeros((64, 64, 3))
    if task == "pose":
        joints = 0.5 + (rng.random((9, 2)) - 0.5) * 0.7
        for k, (across, down) in enumerate(joints):
            near = (x - across) ** 2 + (y - down) ** 2
            scene[near < 0.006] = (60, 50, 45)
            truth[near < 0.004] = np.array([(k * 83) % 200 + 55, (k * 151) % 200 + 55, (k * 47) % 200 + 55])
    else:
        for colour in ((220, 80, 60), (60, 170, 90), (70, 90, 210)):
            across, down = rng.random(2) * 0.6 + 0.2
            shape = (np.abs(x - across) < 0.16) & (np.abs(y - down) < 0.16)
            if colour[0] > 200:
                shape = (x - across) ** 2 + (y - down) ** 2 < 0.03
            scene[shape] = np.array(colour) * 0.8 + 20
            truth[shape] = colour
    if task == "derain":
        truth = scene.copy()
        for column in rng.integers(0, 60, 26):
            start = rng.integers(0, 44)
            for k in range(18):
                scene[start + k, min(63, column + k // 5)] += 70
    scene = scene + rng.normal(0, 5, scene.shape)
    return np.clip(scene, 0, 255).astype(np.uint8), np.clip(truth, 0, 255).astype(np.uint8)


def answer(truth: np.ndarray, wrong: float, rng: np.random.Generator) -> np.ndarray:
    """The truth with some of its 8 x 8 patches taken from elsewhere."""
    out = truth.copy()
    for row in range(0, 64, 8):
        for column in range(0, 64, 8):
            if rng.random() < wrong:
                other = rng.integers(0, 8, 2) * 8
                out[row : row + 8, column : column + 8] = truth[other[0] : other[0] + 8, other[1] : other[1] + 8]
    return out


MEASURES: dict[str, dict[str, Any]] = {
    "segmentation": {"intersection": [90, 0, 40], "union": [120, 0, 80]},
    "pose": {"hit": 8, "labelled": 13, "answer": None},
    "derain": {"psnr_y": 20.43, "ssim_y": 0.6},
}


def make_run(folder: Path, role: str) -> None:
    """A run folder as training and evaluation leave it."""
    rng = np.random.default_rng(5 + (role == "teacher"))
    (folder / "model").mkdir(parents=True)
    config: dict[str, Any] = {
        "run": str(folder),
        "seed": 0,
        "tasks": {task: {} for task in SCORES},
        "model": {"width": 128, "layers": 4},
    }
    if role == "teacher":
        config["model"] = {"width": 192, "layers": 6}
    else:
        config["distill"] = {"temperature": 1.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text(journal(tuple(SCORES), 2.9 if role == "teacher" else 3.1, rng))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(role), sort_keys=True))
    shape = [1024, 2500] if role == "teacher" else [1024, 1000]
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}, "__metadata__": {}}).encode()
    (folder / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    entries = []
    for task in SCORES:
        scenes = np.random.default_rng(0)  # the same scenes for every role
        (folder / "gallery" / task).mkdir(parents=True)
        for k in range(8):
            query, truth = draw(task, scenes)
            shown = {"query": query, "truth": truth, "answer": answer(truth, 0.1 if role == "teacher" else 0.2, rng)}
            entry: dict[str, Any] = {"task": task, "item": f"{task}-{k:05d}", "measures": MEASURES[task]}
            if task == "segmentation" and k == 0:
                entry["item"] = HOSTILE
            for part, picture in shown.items():
                name = HOSTILE if (task, k, part) == ("segmentation", 0, "query") else f"{k:02d}-{part}.png"
                entry[part] = f"gallery/{task}/{name}"
                Image.fromarray(picture).save(folder / entry[part])
            entries.append(entry)
    (folder / "gallery.json").write_text(json.dumps(entries))


def make_pipeline(folder: Path) -> None:
    """A pipeline folder: both runs, the recipe, the balance table."""
    make_run(folder / "teacher", "teacher")
    make_run(folder / "student", "student")
    tasks = {
        "segmentation": {"train": "s3://reader:hunter2@bucket/a?secret_key=hunter2"},
        "pose": {"copies": 10},
        "derain": {"copies": 50},
    }
    config = {"run": "runs/demo", "seed": 0, "tasks": tasks, "balance": {"strategy": "augment"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "data").mkdir()
    counts = {"segmentation": (3000, 1.0), "pose": (300, 10.0), "derain": (60, 50.0)}
    table = [
        {
            "task": task,
            "pairs": pairs,
            "copies": copies,
            "tokens": pairs * copies * 128,
            "share_before": pairs / 3360,
            "share_after": 1 / 3,
            "rows": 1067,
            "seen": 1067 * 4 / pairs,
            "epochs": 1067 * 4 / pairs / copies,
        }
        for task, (pairs, copies) in counts.items()
    ]
    (folder / "data" / "balance.json").write_text(json.dumps(table))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "demo"
    make_pipeline(folder)
    assert write_report(str(folder)) == f"{folder}/report.html"
    return folder


class Elements(HTMLParser):
    """Tags with attributes, and text, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def html_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_holds_every_task_and_metric(pipeline: Path) -> None:
    seen = Elements(html_of(pipeline))
    report = page.read(pipeline)
    rows = scores.score_groups(report, report.tasks)
    assert [(group["task"], len(group["rows"])) for group in rows] == [("segmentation", 3), ("pose", 4), ("derain", 4)]
    assert [row["label"] for row in rows[1]["rows"]] == ["PCK", "AP", "perplexity", "token accuracy"]
    for text in (
        "0.471",
        "0.534",
        "all background",
        "the query median-filtered 3x3",
        "0.440–0.502",
        "48 %",
        "−13 %",
        "2.56 M parameters",
        "augment",
    ):
        assert text in seen.text, text
    images = [attributes for tag, attributes in seen.tags if tag == "img" and "src" in attributes]
    assert len(images) == 3 * 8 * 4
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in images)
    assert sum(tag == "polyline" for tag, _ in seen.tags) == 6 + 2  # losses, and each run's speed


def test_facts_tell_how_long_each_run_was_trained(pipeline: Path) -> None:
    journal = pipeline / "teacher" / "metrics.jsonl"
    whole = journal.read_text()
    journal.write_text("".join(whole.splitlines(keepends=True)[:20]))  # the teacher stopped half way
    try:
        found = sections.facts(page.read(pipeline))
    finally:
        journal.write_text(whole)
    assert ("teacher trained on", "819 k tokens", "in 200 steps") in found
    assert ("student trained on", "1.64 M tokens", "in 400 steps") in found


def test_held_out_losses_are_rings_and_speeds_a_small_line(pipeline: Path) -> None:
    report = page.read(pipeline)
    first = sections.losses(report)[0]
    assert first["chart"].count('class="held-out student"') == first["chart"].count('class="held-out teacher"') == 4
    role, loss, held_out = first["last"][-1]
    assert role == "student" and float(held_out) == pytest.approx(float(loss) + 0.1, abs=0.011)
    assert "on held-out sentences" in first["chart"] and "on held-out sentences" in Elements(html_of(pipeline)).text
    for speed in sections.speeds(report):
        assert 9300 < float(speed["tokens"].replace(",", "")) < 9900 and speed["share"] == "41 %"
        assert speed["chart"].count("<polyline") == 1


def test_a_journal_without_speeds_and_validation_shows_neither(tmp_path: Path) -> None:
    line = {"step": 10, "tokens": 40960, "target_loss": {"pose": 3.1}, "tokens_per_s": "fast", "validation_loss": {"pose": None}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.yaml").write_text("tasks: {pose: {}}\n")
    write_report(str(tmp_path))
    seen = Elements(html_of(tmp_path))
    assert "on held-out sentences" not in seen.text and not any("tokens/s" in text for text in seen.text)
    assert sections.losses(page.read(tmp_path))[0]["last"] == [("model", "3.10", None)]


def test_page_loads_nothing_and_runs_its_own_script_alone(pipeline: Path) -> None:
    text = html_of(pipeline)
    seen = Elements(text)
    policies = [attributes for tag, attributes in seen.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0]["content"].startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert text.count("<script") == 1 and f"script-src 'sha256-{digest}';" in policies[0]["content"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval|Function|fetch|XMLHttp|import|document\.write", script)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith("data:")


def test_names_are_escaped_and_secrets_left_out(pipeline: Path) -> None:
    text = html_of(pipeline)
    assert "<img src=x" not in text
    assert HOSTILE in Elements(text).text  # shown as the text that it is
    assert "hunter2" not in text and "s3://***@bucket/a?secret_key=***" in text


def test_stages_show_what_each_task_has_lost_since_its_own(tmp_path: Path) -> None:
    make_pipeline(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "student").rename(tmp_path / "2-pose-derain")
    make_run(tmp_path / "1-segmentation", "student")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    values["continual"] = {"stages": ["segmentation", ["pose", "derain"]]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    first = json.loads((tmp_path / "1-segmentation" / "evaluation.json").read_text())
    for task, value in (("segmentation", 2.0), ("pose", 30.0), ("derain", 100.0)):
        first["tasks"][task]["target_perplexity"]["value"] = value
    (tmp_path / "1-segmentation" / "evaluation.json").write_text(json.dumps(first))
    last = json.loads((tmp_path / "2-pose-derain" / "evaluation.json").read_text())
    last["tasks"]["segmentation"]["target_perplexity"]["value"] = 2.5
    del last["tasks"]["derain"]
    (tmp_path / "2-pose-derain" / "evaluation.json").write_text(json.dumps(last))
    write_report(str(tmp_path))
    text = html_of(tmp_path)
    table = text.split('id="stages"')[1].split("</section>")[0]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in table.split("<tr>")[2:]]
    assert rows[0][:4] == ["1-segmentation", "2", "30", "100"]
    assert rows[1][:4] == ["2-pose-derain", "2.5", "x", "1.25"] and rows[1][5] == "–"
    assert table.count('class="own"') == 2 and table.count('class="unseen"') == 3
    assert "Stage after stage" not in html_of_single(tmp_path / "1-segmentation")


def html_of_single(folder: Path) -> str:
    write_report(str(folder))
    return html_of(folder)


def test_the_report_as_text_holds_the_tables_and_no_tag(pipeline: Path) -> None:
    path = Path(write_report(str(pipeline), "md"))
    text = path.read_text(encoding="utf-8")
    assert path.name == "report.md" and HOSTILE not in text and "hunter2" not in text and "<svg" not in text
    rows = [line for line in text.splitlines() if line.startswith("| pose | PCK")]
    assert rows == ["| pose | PCK ↑ | 0.212 (mean pose) | 0.618 [0.583–0.653] | 0.547 [0.512–0.582] | 0.978 | 44 % |"]
    for heading in ("## Scores", "## Training", "## Balance"):
        table = text.split(heading)[1].split("\n\n")[1].splitlines()
        assert len(table) > 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1, heading
    assert words.markdown("a|b\n<img>") == "a\\|b &lt;img>"


def test_the_report_for_programs_holds_numbers(pipeline: Path) -> None:
    found = json.loads(Path(write_report(str(pipeline), "json")).read_text(encoding="utf-8"))
    assert found["runs"]["student"]["evaluation"]["tasks"]["pose"]["pck"]["value"] == 0.547
    assert found["runs"]["teacher"]["last"]["step"] == 400 and found["balance"][1]["copies"] == 10.0
    assert "hunter2" not in json.dumps(found)


def test_single_run_has_no_comparison(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "student")
    write_report(str(tmp_path / "run"))
    text = html_of(tmp_path / "run")
    assert "teacher" not in text.split("</style>")[1]
    assert f"lvm-ray train {tmp_path}/run/config.yaml" in text
    assert "No balance table here" in text


def test_every_part_is_optional(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    make_run(whole, "student")
    run.mkdir()
    shutil.copy(whole / "evaluation.json", run)
    write_report(str(run))
    text = html_of(run)
    for note in ("No pictures here", "No losses here", "No balance table here", "No config.yaml here"):
        assert note in text
    (run / "evaluation.json").unlink()
    shutil.copy(whole / "metrics.jsonl", run)
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 410, "tok')  # being written
    shutil.copy(whole / "config.yaml", run)
    write_report(str(run))
    assert "No scores here" in html_of(run) and "1.64 M tokens" in html_of(run)
    shutil.copy(whole / "gallery.json", run)  # names pictures that are not there
    write_report(str(run))
    assert html_of(run).count('<span class="missing">none</span>') == 3 * 8 * 3


def test_values_that_do_not_exist_are_dashes(tmp_path: Path) -> None:
    entry = {
        "value": None,
        "ci95": [None, None],
        "n": 3,
        "floor": 0.5,
        "ceiling": 0.4,
        "progress": None,
        "higher_is_better": True,
    }
    other = {"value": "<b>", "ci95": "<b>", "n": "<b>"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation.json").write_text(json.dumps({"tasks": {"depth": {"rmse": entry, "<b>": other}}}))
    write_report(str(run))
    text = html_of(run)
    assert "the ceiling is no better than the floor" in text and "<b>" not in text.split("</style>")[1] and "nan" not in text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither metrics.jsonl nor evaluation.json"),
        ({"evaluation.json": "{"}, "evaluation.json: not a JSON object"),
        ({"evaluation.json": '{"tasks": [1]}'}, "evaluation.json: tasks"),
        ({"metrics.jsonl": "{}\n[1]\n"}, "metrics.jsonl: line 2"),
        ({"metrics.jsonl": "{}\n", "gallery.json": "{}"}, "gallery.json: not a JSON list"),
        ({"metrics.jsonl": "{}\n", "config.yaml": "a: ["}, "config.yaml: not valid YAML"),
        ({"metrics.jsonl": "{}\n", "model/model.safetensors": "12345678junk"}, "model.safetensors: not a safetensors file"),
        (
            {
                "evaluation.json": '{"tasks": {"pose": {}}}',
                "gallery.json": '[{"task": "pose", "item": "a", "query": "../secret.png"}]',
            },
            "gallery.json: '../secret.png' lies outside",
        ),
        (
            {
                "evaluation.json": '{"tasks": {"pose": {}}}',
                "gallery.json": '[{"task": "pose", "item": "a", "query": "evaluation.json"}]',
            },
            "evaluation.json: cannot read this picture",
        ),
    ],
)
def test_unusable_folders_are_named(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        write_report(str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(str(tmp_path / "nowhere"))


def test_item_scores() -> None:
    def score(measures: Any, **more: Any) -> str:
        return pictures.item_score({"measures": measures, **more})

    assert score({"intersection": [90, 0, 40], "union": [120, 0, 80]}, score=0.5, metric="miou") == "IoU 0.62"
    assert score({"intersection": [0], "union": [0]}) == ""
    assert score({"hit": 8, "labelled": 13}) == "8 of 13 joints"
    assert score({"psnr_y": 20.43}) == "20.4 dB"
    assert score({"other": 1}) == score(None) == score(["hit"]) == score({}, score=None, metric="miou") == ""
    assert score({"best": [0.5]}, score=0.1234, metric="object_iou") == "object IoU 0.12"
    assert score(None, score=20, metric="psnr_y") == "PSNR 20.00"


def test_pictures_are_made_anew(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", comment=b"secret")
    uri, side = pictures.data_uri(tmp_path / "large.jpg")
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert content.startswith(b"\x89PNG") and b"secret" not in content
    assert side == 256 and Image.open(io.BytesIO(content)).size == (256, 128)


def test_gauge_places_marks_between_floor_and_ceiling() -> None:
    inside = charts.gauge(
        [charts.Mark(series.TEACHER, 0.75), charts.Mark(series.STUDENT, 0.5, (0.4, 0.6))], ("floor 1", "<ceiling>")
    )
    assert 'class="mark student" cx="50.00%"' in inside and 'class="mark teacher" cx="74.00%"' in inside
    assert 'x="40.40%" width="19.20%"' in inside and "&lt;ceiling&gt;" in inside
    assert 'aria-label="teacher 75 %, student 50 % of the way from floor to ceiling"' in inside
    below = charts.gauge([charts.Mark(series.MODEL, -4.0)])  # held at the edge: floor and ceiling stay readable
    assert 'cx="2.00%"' in below and 'class="track" x1="34.00%" x2="98.00%"' in below


def test_loss_chart_draws_every_line_and_says_it() -> None:
    chart = charts.loss_chart("<pose>", [charts.Line(series.MODEL, [(0.0, 4.0), (2e6, 2.0)])], 3.0, "loss-0")
    assert chart.count("<polyline") == 1 and '<line class="floor"' in chart
    assert "model: 4.00 at first, 2.00 after 2 M tokens" in chart and "&lt;pose&gt;" in chart and "<pose>" not in chart
    assert ">0<" in chart and ">500 k<" in chart and ">2 M<" in chart
    points = chart.split('points="')[1].split('"')[0].split()
    assert points == ["40.0,24.0", "348.0,192.0"]  # first at the top left, last at the bottom right
    assert "nan" not in charts.loss_chart("flat", [charts.Line(series.MODEL, [(0.0, 2.0)])], None, "loss-1")


PARTS = [
    mixture.Part("<a>", 0.8, 0.5, 1.0, 2.0, 2.0, 2.0),
    mixture.Part("b", 0.2, 0.5, 10.0, version=100.0, original=1000.0, warned=True),
]


def test_share_chart_draws_two_bars_a_task() -> None:
    chart = mixture.share_chart(PARTS)
    assert chart.count('class="before"') == chart.count('class="after"') == 2
    assert 'width="82.00%"' in chart and 'width="20.50%"' in chart and "80.0 %" in chart and "&lt;a&gt;" in chart
    assert ">originals alone<" in chart and ">10 copies<" in chart


def test_repeats_chart_places_versions_originals_and_pixels_on_powers_of_ten() -> None:
    chart = mixture.repeats_chart(PARTS, 10.0)
    # From 1 to 1000: three powers over 94 percent.
    assert '<circle class="version warned" cx="65.67%"' in chart and '<circle class="original" cx="97.00%"' in chart
    assert '<line class="limit" x1="34.33%"' in chart and chart.count('class="pixel"') == 1
    assert "b: version 100 ×, original 1,000 ×" in chart and "&lt;a&gt;: version 2 ×, original 2 ×, pixel 2 ×" in chart
    nothing = mixture.repeats_chart([mixture.Part("c", 0.0, 0.0, 1.0, 0.0, 0.0)], 16.0)
    assert "<circle" not in nothing and "nan" not in nothing


def test_the_balance_picture_is_a_file_of_its_own() -> None:
    rows = [
        {"task": "<a>", "strategy": "repeat", "share_before": 1.0, "share_after": 1.0, "epochs": float("nan"), "copies": 0.02}
    ]
    picture = mixture.balance_picture([*rows, {"task": "no shares"}], 16.0)
    root = ElementTree.fromstring(picture)  # well-formed by itself
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme: dark" in picture
    assert "Balance: repeat" in picture and "2.0 % of the originals" in picture and "no shares" not in picture
    ElementTree.fromstring(mixture.balance_picture([], 16.0))


def test_page_shows_the_mixture_and_warns(pipeline: Path, tmp_path: Path) -> None:
    place = pipeline / "data" / "balance.json"
    whole = place.read_text()
    rows = json.loads(whole)
    rows[1] |= {"strategy": "augment", "pixel_seen": 6.25, "weight": 1.5, "warning": "pose: <often>"}
    place.write_text(json.dumps(rows))
    try:
        text = page.render(page.read(pipeline))
    finally:
        place.write_text(whole)
    assert "pose: &lt;often&gt;" in text and "6.25 ×" in text and "weight of its loss" in text and 'class="repeats"' in text
    plain = html_of(pipeline)
    assert "weight of its loss" not in plain and 'class="warning"' not in plain and 'class="repeats"' in plain


def test_thin_keeps_the_end_and_the_mean() -> None:
    points = [(float(k), float(k % 2)) for k in range(1000)]
    thinned = charts.thin(points, 100)
    assert len(thinned) == 100 and thinned[-1] == (999.0, 0.5)
    assert charts.thin(points[:5], 100) == points[:5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.9, 6.3, [2, 3, 4, 5, 6, 7]),
        (0.12, 0.14, [0.12, 0.125, 0.13, 0.135, 0.14]),
        (3, 3, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, 5) == pytest.approx(expected)


def test_counts_and_percents() -> None:
    assert [words.count(value) for value in (0, 840, 1000, 1_638_400, 999_999, 2.5e9)] == [
        "0",
        "840",
        "1 k",
        "1.64 M",
        "1 M",
        "2.5 G",
    ]
    assert [words.percent(value) for value in (0.534, -0.125, -0.001, 1.0)] == ["53 %", "−12 %", "0 %", "100 %"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(path: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    assert CHROMIUM
    return subprocess.run(
        [
            CHROMIUM,
            *quiet.split(),
            "--no-first-run",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
def test_browser_shows_the_page_and_asks_for_nothing(pipeline: Path, tmp_path: Path) -> None:
    shown = browse(pipeline / "report.html", tmp_path / "a", "--dump-dom")
    assert "<h1>demo</h1>" in shown.stdout and shown.stdout.count("<img ") == 3 * 8 * 4 + 1
    assert "CONSOLE" not in shown.stderr
    # The same look at a page that does load something: the console must say so, or the line above proves nothing.
    tampered = tmp_path / "tampered.html"
    tampered.write_text(html_of(pipeline).replace("</main>", '<img src="missing.png" onerror="alert(1)"></main>'))
    assert "Content Security Policy" in browse(tampered, tmp_path / "b", "--dump-dom").stderr
    picture = tmp_path / "page.png"
    browse(pipeline / "report.html", tmp_path / "c", f"--screenshot={picture}", "--window-size=1200,1600", "--hide-scrollbars")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    reds = (pixels == (220, 80, 60)).all(1).sum()  # the discs of the true masks: the pictures are decoded and drawn
    assert reds > 5000
