"""The report page: `write_report(folder)` reads a pipeline or run folder and writes `report.html` into it.

The page is one file of HTML that loads nothing: styles, pictures and one script are in it. Its Content-Security-Policy allows
that script alone, by its hash, and forbids to load anything; without scripts the page shows all that it has. All text goes
through the template's autoescape. What a folder lacks is left out with a short note.

The way through this package: `folder` gathers a folder into a `Report`, `sections` turns that into plain values as `words` writes
them, `render` fills the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lvm_ray.report import mixture
from lvm_ray.report.folder import Report, read, read_json
from lvm_ray.report.sections import command, content, versions
from lvm_ray.report.stages import stage_rows
from lvm_ray.report.words import markdown

PLACE = Path(__file__).parent


def write_report(folder: str, form: str = "html", others: Sequence[str] = (), names: Sequence[str] = ()) -> str:
    """Write `report.html`, `.md` or `.json` into a pipeline or run folder, with other runs beside it under these names; its path.

    Raises UserError where a folder has neither metrics nor an evaluation, or where a file in it cannot be read.
    """
    text = render(read(*map(Path, (folder, *others)), names=names), form)
    path = Path(folder) / f"report.{form}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return str(path)


def render(report: Report, form: str = "html") -> str:
    """The page as HTML; as Markdown without its pictures; or as JSON, what a program would read of it."""
    if form == "json":
        return json.dumps(values(report), indent=1, ensure_ascii=False) + "\n"
    environment = Environment(
        loader=FileSystemLoader(PLACE), autoescape=form == "html", undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = markdown
    parts = _parts() if form == "html" else {}
    return environment.get_template(f"page.{form}").render(**parts, **content(report))


def values(report: Report) -> dict[str, Any]:
    """What a program would read of a folder: each run's evaluation, references and last line of its journal, and the balance."""
    runs = {
        run.name: {
            "parameters": run.parameters,
            "pairs": run.pairs,
            "evaluation": run.evaluation,
            "references": run.references,
            "last": run.last or None,
        }
        for run in report.runs
    }
    stages = stage_rows(report.folder, report.config, report.tasks, lambda path: read_json(path, dict))
    known = {"name": report.folder.resolve().name, "seed": report.config.get("seed"), "command": command(report)}
    return {
        **known,
        "main": report.main.name,
        "runs": runs,
        "stages": stages,
        "balance": report.balance,
        "versions": dict(versions()),
    }


def _parts() -> dict[str, Markup]:
    """What stands in the page as it is: its style, its script, and the script's hash as its policy names it."""
    script = (PLACE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = mixture.colours() + (PLACE / "style.css").read_text(encoding="utf-8")
    return {"style": Markup(style), "script": Markup(script), "script_hash": Markup(f"sha256-{digest}")}
