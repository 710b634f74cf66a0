"""What a harness of faults leaves behind: a file of cases, and their table between two marks of `docs/reliability.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/reliability.md")


def write(cases: Sequence[dict[str, Any]], out: Path, mark: str) -> None:
    """Write `[{"case", "outcome", "ok"}]`, and the table between `<!-- MARK -->` and `<!-- end of MARK -->`."""
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(list(cases), indent=1) + "\n")
    lines = ["| case | outcome | |", "|---|---|---|"]
    lines += [
        f"| {case['case']} | {case['outcome'].replace('|', '/')} | {'ok' if case['ok'] else '**fails**'} |" for case in cases
    ]
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = PAGE.read_text().partition(first)
    _, _, after = rest.partition(last)
    PAGE.write_text("".join([before, first, "\n", "\n".join(lines), "\n", last, after]))
