"""The page in a real browser: filters, sorting, keys and larger pictures work; nothing is loaded; hostile names do no harm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from lvm_ray.data.tokenize import tokenize
from lvm_ray.progress import Bar
from lvm_ray.report.page import write_report
from tests.browser import CHROMIUM, Browser, browser
from tests.test_evaluate import evaluate, make_run
from tests.test_report import HOSTILE, make_pipeline
from tests.toys import SIZE, load_toy_tokenizer, toy_recipe

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
SHOWN = "[...document.querySelectorAll('{0}')].filter(one => one.getClientRects().length)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "demo"
    make_pipeline(folder)
    return Path(write_report(str(folder)))


@pytest.fixture
def opened(chromium: Browser, page: Path) -> Browser:
    chromium.open(page)
    return chromium


def texts(shown: Browser, selector: str) -> list[str]:
    """The texts of what a selector finds, of that which is shown."""
    found: list[str] = shown.value(f"{SHOWN.format(selector)}.map(one => one.textContent.trim())")
    return found


def assert_alone(shown: Browser) -> None:
    """The page asked for nothing, ran nothing but its script and had nothing to complain of."""
    asked = [event["request"]["url"] for event in shown.of("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == asked[:1] and asked[0].startswith("file:")
    assert not shown.of("Log.entryAdded") and not shown.of("Runtime.consoleAPICalled")
    assert not shown.of("Runtime.exceptionThrown") and not shown.of("Page.javascriptDialogOpening")


def test_a_slash_filters_and_escape_shows_everything_again(opened: Browser) -> None:
    tiles = texts(opened, ".tile h3")
    assert len(tiles) == 3
    opened.press("/")
    assert opened.value("document.activeElement.id") == "words"
    opened.press(*"pose pck")
    assert [text.split()[0] for text in texts(opened, ".tile h3")] == ["pose"]
    assert texts(opened, "#found") == ["2 of 23 parts"]  # its tile, and the metric's row
    assert len(texts(opened, "#metrics ~ * .group")) == 1 and texts(opened, "h2") == ["Scores", "All metrics", "How it was made"]
    opened.press("Escape")
    assert texts(opened, ".tile h3") == tiles and opened.value("document.activeElement.id") == ""
    opened.press(*"fderain")
    assert len(texts(opened, "figure .chart")) == 1 and len(texts(opened, "#balance ~ * tbody tr")) == 1
    opened.press("Escape", "f", *"no such task")
    assert texts(opened, "#found") == ["nothing of this name"] and texts(opened, "h2") == ["How it was made"]
    opened.press("Escape")
    assert_alone(opened)


def test_choices_of_task_and_metric_filter(opened: Browser) -> None:
    choose = "for (const [id, value] of Object.entries({0})) {{ const one = document.getElementById(id); one.value = value; "
    choose += "one.dispatchEvent(new Event('change')) }}"
    opened.value(choose.format(json.dumps({"metric": "psnr_y"})))
    assert [text.split()[0] for text in texts(opened, ".tile h3")] == ["derain"]
    assert len(texts(opened, "figure .chart")) == 3, "what has no metric stays"
    opened.value(choose.format(json.dumps({"task": "pose", "metric": ""})))
    assert len(texts(opened, "#metrics ~ * tr[data-task]")) == 4 and len(texts(opened, ".gallery")) == 1
    opened.value("document.getElementById('clear').click()")
    assert len(texts(opened, ".tile h3")) == 3 and texts(opened, "#found") == [""]


def test_columns_are_sorted_by_their_headings(opened: Browser) -> None:
    table = "#metrics ~ * table"
    own = texts(opened, f"{table} tr[data-task] th")
    heads = texts(opened, f"{table} thead th")
    column = heads.index("student")
    head = f"document.querySelectorAll('{table} thead th')[{column}]"
    orders = []
    for _ in range(3):
        opened.value(f"{head}.querySelector('button').focus()")
        opened.press("Enter")
        values = opened.value(f"{SHOWN.format(table + ' tr[data-task]')}.map(row => Number(row.cells[{column}].dataset.value))")
        orders.append((opened.value(f"{head}.ariaSort"), values))
    assert [name for name, _ in orders] == ["descending", "ascending", "none"]
    assert orders[0][1] == sorted(orders[0][1], reverse=True) and orders[1][1] == sorted(orders[1][1])
    assert texts(opened, f"{table} tr[data-task] th") == own and len(texts(opened, f"{table} .group")) == 3
    opened.value(f"{head}.querySelector('button').click()")
    assert not texts(opened, f"{table} .group") and len(texts(opened, f"{table} .of")) == len(own), "each row names its task"
    # By words, and where a value is missing: perplexity has no ceiling, so no progress.
    opened.value(f"document.querySelector('{table} thead button').click()")
    assert (names := texts(opened, f"{table} tr[data-task] th")) == sorted(names, key=str.lower)
    for _ in range(2):
        opened.value(f"document.querySelector('{table} thead th:last-child button').click()")
        known = opened.value(
            f"{SHOWN.format(table + ' tr[data-task]')}.map(row => row.lastElementChild.dataset.value !== undefined)"
        )
        assert known == sorted(known, reverse=True), "those without a value come last"


def test_keys_go_from_section_to_section_and_are_explained(opened: Browser) -> None:
    heads = texts(opened, "main h2")
    there = "document.activeElement.textContent"
    seen = []
    for _ in heads:
        opened.press("j")
        seen.append(opened.value(there))
    assert seen == heads
    opened.press("j")
    assert opened.value(there) == heads[-1]
    opened.press("k", "k")
    assert opened.value(there) == heads[-3]
    opened.press("?")
    assert opened.value("document.getElementById('keys').open")
    opened.press("/", "j")
    assert opened.value("document.activeElement.id") != "words", "an open dialog keeps the keys for itself"
    opened.press("Escape")
    assert not opened.value("document.getElementById('keys').open")
    assert_alone(opened)


def test_pictures_are_enlarged_and_walked(opened: Browser) -> None:
    assert opened.value(
        "[...document.querySelectorAll('.gallery')].map(one => one.querySelectorAll('[tabindex=\"0\"]').length)"
    ) == [
        1,
        1,
        1,
    ]
    opened.value("document.querySelector('.gallery img').focus()")
    here = "document.activeElement.alt"
    large = "document.querySelector('#large img').alt"
    assert opened.value(here) == f"segmentation, {HOSTILE}: query"
    opened.press("ArrowRight", "ArrowDown")
    assert opened.value(here) == "segmentation, segmentation-00001: truth"
    opened.press("Enter")
    assert opened.value("document.getElementById('large').open")
    assert opened.value(large) == "segmentation, segmentation-00001: truth"
    assert texts(opened, "#large output") == ["6 of 96"]
    opened.press("ArrowLeft", "ArrowLeft")
    assert opened.value(large) == f"segmentation, {HOSTILE}: student"
    assert texts(opened, "#large figcaption") == [f"segmentation, {HOSTILE}: student · IoU 0.62"]
    assert opened.value("document.querySelector('#large img').getBoundingClientRect().width") > 300
    opened.press("Escape")
    assert not opened.value("document.getElementById('large').open")
    assert opened.comes(here, f"segmentation, {HOSTILE}: student"), "the focus is where the walk has ended"
    opened.press(" ", "ArrowUp")
    assert opened.value(large) == f"segmentation, {HOSTILE}: student", "above the first there is none"
    opened.press("Escape")
    assert_alone(opened)


def test_a_page_that_is_tampered_with_runs_no_other_script(chromium: Browser, page: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered.html"
    evil = '<script>document.title = "harmed"</script><img src="missing.png" onerror="document.title = \'harmed\'">'
    tampered.write_text(page.read_text().replace("</main>", f"{evil}</main>"))
    chromium.open(tampered)
    assert chromium.value("document.title") == "demo · lvm-ray report"
    refused = " ".join(event["entry"]["text"] for event in chromium.of("Log.entryAdded"))
    assert refused.count("Content Security Policy") >= 2, "it says so: the other tests would notice"
    assert len(texts(chromium, "#bar")) == 1, "its own script still runs"


def test_without_scripts_everything_is_there(chromium: Browser, page: Path) -> None:
    chromium.open(page, scripts=False)
    root = chromium.call("DOM.getDocument")["root"]["nodeId"]
    shown = chromium.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    assert re.search(r'<div id="bar"[^>]* hidden=""', shown) and shown.count('hidden=""') == 1
    assert not re.search(r'<img[^>]* role="button"|<th[^>]*><button', shown)
    assert shown.count("data:image/png;base64,") == 3 * 8 * 4


@pytest.mark.parametrize(("width", "media"), [(400, {}), (1200, {"prefers-color-scheme": "dark"})])
def test_nothing_is_wider_than_the_window(chromium: Browser, page: Path, width: int, media: dict[str, str]) -> None:
    chromium.open(page, width=width, media=media)
    assert chromium.value("document.documentElement.scrollWidth") <= width
    light = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(20, 24, 27)") == bool(media)


def test_motion_is_left_out_for_those_who_want_none(chromium: Browser, page: Path) -> None:
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        chromium.open(page, media={"prefers-reduced-motion": wish})
        assert chromium.value("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really evaluated, on test images of which one has a hostile name, and so has the folder."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for split, names in (
        ("train", [f"{i}.png" for i in range(8)]),
        ("test", [HOSTILE, "![b](http:x).png", "`|[a](javascript:alert(1)).png"]),
    ):
        for kind in ("rainy", "clean"):
            place = folder / split / kind
            place.mkdir(parents=True)
            for name in names:
                Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)).save(place / name)
    sources: dict[str, Any] = {
        split: {"rainy": f"{folder}/{split}/rainy", "clean": f"{folder}/{split}/clean"} for split in ("train", "test")
    }
    run = folder / "<b onclick=alert(2)>&amp;`run`"
    recipe = toy_recipe(run, tasks={"derain": sources}, evaluate={"batch": 3, "resamples": 100})
    tokenize(recipe, Bar("tokenize", None, ""), load_toy_tokenizer)
    evaluate([make_run(run, recipe)], recipe)
    return run


def test_hostile_names_of_a_real_evaluation_do_no_harm_in_the_page(chromium: Browser, hostile: Path) -> None:
    chromium.open(Path(write_report(str(hostile))))
    name = HOSTILE.removesuffix(".png")
    assert chromium.value("document.querySelector('h1').textContent") == hostile.name
    items = chromium.value("[...document.querySelectorAll('.item')].map(one => one.title)")
    assert name in items and "![b](http:x)" in items
    assert (
        chromium.value("document.querySelectorAll('main img:not([src^=\"data:\"]), main [onclick], main [onerror]').length") == 0
    )
    chromium.value(f"[...document.querySelectorAll('.gallery img')].find(one => one.alt.includes({json.dumps(name)})).focus()")
    chromium.press("Enter")
    assert name in texts(chromium, "#large figcaption")[0]
    chromium.press("ArrowRight", "Escape")
    assert chromium.comes("document.querySelector('dialog[open]') === null", True), "keys belong to the page again"
    chromium.press("/", *name)
    assert chromium.comes("document.getElementById('found').textContent", "nothing of this name")
    assert_alone(chromium)


def test_hostile_names_of_a_real_evaluation_do_no_harm_in_markdown(hostile: Path) -> None:
    text = Path(write_report(str(hostile), "md")).read_text(encoding="utf-8")
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert not re.search(r"<(img|a|b|script)\b", shown)
    name = HOSTILE.removesuffix(".png").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{name}</td>" in shown and "<td>![b](http:x)</td>" in shown and "<td>`|[a](javascript:alert(1))</td>" in shown
    assert f"<h1>{hostile.name.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</h1>" in shown
    assert json.loads(Path(write_report(str(hostile), "json")).read_text())["name"] == hostile.name
