"""What the page says of several runs beside each other, of benchmarks, of devoted networks and of items that stand out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lvm_ray import cli
from lvm_ray.errors import UserError
from lvm_ray.report import charts, page, pictures, scores, sections, series
from lvm_ray.report.page import write_report
from tests.test_report import Elements, evaluation, html_of, make_pipeline, make_run

CAMVID = {
    "version": 2,
    "task": "segmentation",
    "protocol": {"says": "CamVid <as others> score it.", "examples": 3, "pairs": "run", "alike": None, "draws": 0, "seed": 0},
    "scores": evaluation("student")["tasks"]["segmentation"],
    "bad": 1,
    "nothing": 0,
}
REFERENCES = {
    "segmentation": {"miou": {"value": 0.6112, "ci95": [0.58, 0.64], "n": 96}},
    "how": {"segmentation": "classes, 0.2 M parameters: 60 core-seconds", "pose": "heatmaps"},
    "key": "0123",
}


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run folder, a pipeline and another run: alike but for what they had."""
    make_run(tmp_path / "runs/small/run", "student")
    make_pipeline(tmp_path / "runs/demo/run")
    make_run(tmp_path / "runs/large/run", "teacher")
    return [tmp_path / f"runs/{name}/run" for name in ("small", "demo", "large")]


def test_several_runs_stand_beside_each_other_by_what_their_paths_differ_in(runs: list[Path]) -> None:
    path = write_report(str(runs[0]), "html", [str(run) for run in runs[1:]])
    assert path == f"{runs[0]}/report.html" and not (runs[1] / "report.html").exists()
    report = page.read(*runs)
    assert [run.name for run in report.runs] == ["small", "demo", "large"] and report.main is report.runs[0]
    assert report.runs[1].folder == runs[1] / "student", "of a pipeline its student"
    text = html_of(runs[0])
    heads = re.findall(r"([^<>]*)</th>", text.split('aria-label="All metrics"')[1].split("</tr>")[0])
    assert heads == ["metric", "floor", "small", "demo", "large", "ceiling", "progress of small"]
    seen = Elements(text)
    assert sum(tag == "polyline" and "line run-" in attributes["class"] for tag, attributes in seen.tags) == 3 * 3 + 3
    pose = next(group for group in scores.score_groups(report, report.tasks) if group["task"] == "pose")["rows"][0]
    assert [cell["text"] for cell in pose["values"]] == ["0.547", "0.547", "0.618"] and pose["progress"] == "44 %"
    images = [attributes for tag, attributes in seen.tags if tag == "img" and "src" in attributes]
    assert len(images) == 3 * 8 * 5 and "Beside it: demo, large." in re.sub(r"\s+", " ", " ".join(seen.text))


def test_runs_have_names_of_their_own_and_are_named_once(runs: list[Path]) -> None:
    assert [run.name for run in page.read(*runs[:2], names=["a", "b"]).runs] == ["a", "b"]
    with pytest.raises(UserError, match="named twice"):
        page.read(runs[0], runs[1], runs[0].parent / "run")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        page.read(runs[0], runs[0].parent / "nowhere")


def test_the_verb_takes_other_runs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *map(str, runs), "--format", "json"]) == 0
    found = json.loads((runs[0] / "report.json").read_text())
    assert [*found["runs"]] == ["small", "demo", "large"] and found["main"] == "small"
    assert found["runs"]["demo"]["pairs"] == {"segmentation": 3000, "pose": 300, "derain": 60}
    assert cli.main(["report", str(runs[0]), str(runs[0])]) == 2 and "named twice" in capsys.readouterr().err


def test_many_runs_fit_on_a_page(tmp_path: Path) -> None:
    for k in range(9):
        make_run(tmp_path / f"run{k}", "student")
    write_report(str(tmp_path / "run0"), "html", [str(tmp_path / f"run{k}") for k in range(1, 9)])
    text = html_of(tmp_path / "run0")
    assert all(f'"line run-{k}"' in text for k in range(7)) and text.count('"line run-0 dashed"') > 3
    write_report(str(tmp_path / "run0"), "md", [str(tmp_path / f"run{k}") for k in range(1, 9)])
    table = (tmp_path / "run0/report.md").read_text().split("## Scores")[1].split("\n\n")[1].splitlines()
    assert len({line.count("|") for line in table}) == 1 and table[0].count("|") == 6 + 9


def test_scale_is_drawn_where_runs_differ(runs: list[Path]) -> None:
    small, demo, large = runs
    report = page.read(small, demo)
    assert sections.scales(report) == [], "one size, one training, and pairs known of one alone"
    drawn = sections.scales(page.read(small, demo, large))
    assert [(scale["task"], scale["name"], len(scale["charts"])) for scale in drawn] == [
        ("segmentation", "miou", 1),
        ("pose", "pck", 1),
        ("derain", "psnr_y", 1),
    ]
    assert "demo: 0.471 at 1.02 M; small: 0.471 at 1.02 M; large: 0.534 at 2.56 M" in drawn[0]["charts"][0]
    lines = (large / "metrics.jsonl").read_text().splitlines(keepends=True)
    (large / "metrics.jsonl").write_text("".join(lines[:20]))
    (large / "data").mkdir()
    (large / "data/balance.json").write_text(json.dumps([{"task": "pose", "pairs": 30}]))
    both = {scale["task"]: len(scale["charts"]) for scale in sections.scales(page.read(small, demo, large))}
    assert both == {"segmentation": 2, "pose": 3, "derain": 2}
    assert sections.scales(page.read(demo)) == [], "a teacher beside its student is no curve"


def test_scale_chart_places_amounts_on_powers_of_ten() -> None:
    dots = [
        charts.Dot(series.series_of(k, f"<{k}>"), amount, k / 2, (k / 2 - 0.1, k / 2 + 0.1))
        for k, amount in enumerate((1e4, 1e5, 1e6))
    ]
    chart = charts.scale_chart("pose", "PCK", "parameters", dots, "scale-0")
    # A tenth of two powers at either side: 0.2, 1.2, 2.2 of 2.4 over 308 pixels from 40.
    places = re.search('class="through" points="(.*?)"', chart)
    assert places and [point.split(",")[0] for point in places[1].split()] == ["65.7", "194.0", "322.3"]
    assert all(f">{word}<" in chart for word in ("10 k", "100 k", "1 M")) and chart.count('class="whisker') == 3
    assert "&lt;0&gt;: 0 at 10 k" in chart and "<0>" not in chart and "nan" not in chart
    equal = charts.scale_chart("pose", "PCK", "parameters", [dots[0], dots[0], dots[1]], "scale-1")
    assert "through" not in equal, "no line through runs of one size"
    assert charts.round_amounts(1.1e6, 2.9e6) == [1.5e6, 2e6, 2.5e6] and charts.round_amounts(1e3, 1e12) == [
        1e3,
        1e5,
        1e7,
        1e9,
        1e11,
    ]


def test_benchmarks_have_a_section_with_their_protocol(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "student")
    change(run / "evaluation.json", benchmarks={"camvid": CAMVID})
    entries = json.loads((run / "gallery.json").read_text())
    shown = [entry | {"task": "camvid@2"} for entry in entries if entry["task"] == "segmentation"][:4]
    (run / "gallery.json").write_text(json.dumps(entries + shown))
    write_report(str(run))
    text = html_of(run).split('id="benchmarks"')[1].split("</section>")[0]
    seen = Elements(text)
    for words in ("camvid@2", "CamVid <as others> score it.", "the run’s training pairs", "mIoU", "0.471", "48 %"):
        assert words in seen.text, words
    assert "Answers and items: 1 could not be used." in seen.text and "answers drawn" not in seen.text
    assert sum(tag == "img" for tag, _ in seen.tags) == 4 * 3
    assert '<option value="camvid@2">' in html_of(run)
    write_report(str(run), "md")
    text = (run / "report.md").read_text()
    assert "| camvid@2 | mIoU ↑ | 0.112 (all background) | 0.471 [0.440–0.502] | 0.861 | 48 % |" in text
    assert "- camvid@2: CamVid &lt;as others> score it. (test items: 96; pairs before each query: 3" in text
    change(run / "evaluation.json", benchmarks={"camvid@2": CAMVID})
    assert page.read(run).benchmarks == ["camvid@2"]
    for broken in ({"camvid": {"version": 1}}, [1], {"camvid": [1]}):
        change(run / "evaluation.json", benchmarks=broken)
        with pytest.raises(UserError, match=r"evaluation\.json: benchmarks: "):
            page.read(run)


def test_devoted_networks_have_a_column_and_a_mark(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "student")
    assert "reference" not in Elements(html_of_run(run)).text
    (run / "references.json").write_text(json.dumps(REFERENCES))
    report = page.read(run)
    first, pose, _ = scores.score_groups(report, report.tasks)
    assert first["rows"][0]["reference"] == {"text": "0.611", "interval": "0.580–0.640", "value": 0.6112}
    assert first["referred"] and not pose["referred"] and first["rows"][1]["reference"] is None
    tile = scores.task_tile(report, "segmentation")
    assert tile and [(name, part) for _, name, part in tile["progress"]] == [("model", "48 %"), ("reference", "67 %")]
    assert "mark reference" in tile["gauge"] and 'aria-label="reference 67 %, model 48 %' in tile["gauge"]
    text = html_of_run(run)
    assert "segmentation: classes, 0.2 M parameters: 60 core-seconds; pose: heatmaps" in text
    write_report(str(run), "md")
    lines = (run / "report.md").read_text().splitlines()
    assert (
        "| segmentation | mIoU ↑ | 0.112 (all background) | 0.471 [0.440–0.502] | 0.611 [0.580–0.640] | 0.861 | 48 % |" in lines
    )
    assert (
        len({line.count("|") for line in lines if line.startswith(("| task | metric", "| segmentation | m", "| pose"))} - {3})
        == 1
    )
    for broken in ({"segmentation": [1], "how": 3}, {"segmentation": {"miou": 3}}):
        (run / "references.json").write_text(json.dumps(broken))
        assert "reference" not in Elements(html_of_run(run)).text


def html_of_run(run: Path) -> str:
    write_report(str(run))
    return html_of(run)


def test_items_that_stand_out_stand_beside_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "student")
    entries = json.loads((run / "gallery.json").read_text())
    poses = [entry for entry in entries if entry["task"] == "pose"]
    poses[2]["why"] = "worst"
    more = [dict(poses[k], item=f"more-{k}", why=why) for k, why in enumerate(("worst", "best", "median", "first", "odd"))]
    (run / "gallery.json").write_text(json.dumps([*entries, *more]))
    report = page.read(run)
    shown = {gallery["task"]: gallery for gallery in sections.galleries(report, report.tasks)}
    assert [len(part.rows) for part in shown["segmentation"]["parts"]] == [4, 4], "an older gallery"
    first, others = shown["pose"]["parts"]
    assert [row.why for row in first.rows] == ["", "", "worst", "", "", "", "", ""]
    assert [(row.item, row.why) for row in others.rows] == [("more-1", "best"), ("more-2", "median"), ("more-0", "worst")]
    text = html_of_run(run)
    assert text.count('<b class="why">') == 4 and "the best, the middle and the worst" in text
    write_report(str(run), "md")
    lines = (run / "report.md").read_text().split("## Items that stand out")[1].split("## ")[0].splitlines()
    assert [line for line in lines if line.startswith("| pose")] == [
        "| pose | worst | pose-00002 | 8 of 13 joints |",
        "| pose | best | more-1 | 8 of 13 joints |",
        "| pose | median | more-2 | 8 of 13 joints |",
        "| pose | worst | more-0 | 8 of 13 joints |",
    ]


def test_an_item_that_another_run_does_not_show_has_no_answer_of_it(runs: list[Path]) -> None:
    small, _, large = runs
    entries = json.loads((large / "gallery.json").read_text())
    (large / "gallery.json").write_text(json.dumps(entries[1:]))
    report = page.read(small, large)
    first = sections.galleries(report, ["segmentation"])[0]["parts"][0].rows[0]
    assert [one.uri is None for one in first.pictures] == [False, False, False, True]
    (small / "gallery.json").unlink()
    assert len(sections.galleries(page.read(small, large), ["segmentation"])[0]["parts"][0].rows) == 4, "the other run's"
    assert pictures.parts([]) == []
