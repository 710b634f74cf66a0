"""The report page: `write_report(folder)` reads a pipeline or run folder and writes `report.html` into it.

The page is one file of HTML without scripts: styles and pictures are in it, and its Content-Security-Policy forbids to load
anything. All text goes through the template's autoescape. What a folder lacks is left out with a short note.

The way through this package: `folder` gathers a folder into a `Report`, `sections` turns that into plain values as `words` writes
them, `render` fills the template.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lvm_ray.report import mixture
from lvm_ray.report.folder import Report, read, read_json
from lvm_ray.report.sections import command, content, versions
from lvm_ray.report.stages import stage_rows
from lvm_ray.report.words import markdown


def write_report(folder: str, form: str = "html") -> str:
    """Write `report.html`, `.md` or `.json` into a pipeline or run folder; its path.

    Raises UserError where the folder has neither metrics nor an evaluation, or where a file in it cannot be read.
    """
    text = render(read(Path(folder)), form)
    path = Path(folder) / f"report.{form}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return str(path)


def render(report: Report, form: str = "html") -> str:
    """The page as HTML; as Markdown without its pictures; or as JSON, what a program would read of it."""
    if form == "json":
        return json.dumps(values(report), indent=1, ensure_ascii=False) + "\n"
    place = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=form == "html", undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = markdown
    style = Markup(mixture.colours() + (place / "style.css").read_text(encoding="utf-8")) if form == "html" else ""
    return environment.get_template(f"page.{form}").render(style=style, **content(report))


def values(report: Report) -> dict[str, Any]:
    """What a program would read of a folder: each run's evaluation and last line of its journal, and the balance table."""
    runs = {
        run.role: {"parameters": run.parameters, "evaluation": run.evaluation, "last": run.metrics[-1] if run.metrics else None}
        for run in report.runs
    }
    stages = stage_rows(report.folder, report.config, report.tasks, lambda path: read_json(path, dict))
    known = {"name": report.folder.resolve().name, "seed": report.config.get("seed"), "command": command(report)}
    return {**known, "runs": runs, "stages": stages, "balance": report.balance, "versions": dict(versions())}
