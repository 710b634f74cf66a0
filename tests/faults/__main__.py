"""Runs fault cases and writes `runs/faults.json`: [{"case", "outcome", "ok"}], and the table of `docs/reliability.md`.

    make faults [ONLY="kills elastic"]

Groups that are not run keep their cases. Too slow for `make test`: each case starts and kills whole runs of the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.faults import elastic, page, tokenizing, training
from tests.faults.runs import Base, Case, base

OUT = Path("runs/faults.json")
MARK = "faults"

TRAINING: dict[str, Callable[[Base], Iterator[Case]]] = {
    "kills": training.kills,
    "uploads": training.uploads,
    "disk": training.full_disk,
    "corrupt": training.corrupt,
    "diverged": training.diverged,
    "preemption": training.preempted,
    "workers": elastic.command_line,
    "elastic": elastic.grid,
}


def main() -> int:
    groups = ["tokenizing", *TRAINING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*groups, []], help="names of groups; default: all")
    chosen = parser.parse_args().only or groups
    known: list[Case] = json.loads(OUT.read_text()) if OUT.is_file() else []
    cases = {group: [case for case in known if case["case"].startswith(f"{group}: ")] for group in groups}
    with base() as small:
        for group in chosen:
            cases[group] = []
            began = time.monotonic()
            run = tokenizing.cases if group == "tokenizing" else partial(TRAINING[group], small)
            for case in run():
                cases[group].append({**case, "case": f"{group}: {case['case']}"})
                print(f"{'ok  ' if case['ok'] else 'FAIL'} {group}: {case['case']}: {case['outcome']}", flush=True)
                page.write([case for group in groups for case in cases[group]], OUT, MARK)
            print(f"     {group}: {time.monotonic() - began:.0f} s", flush=True)
    return 0 if all(case["ok"] for group in chosen for case in cases[group]) else 1


if __name__ == "__main__":
    sys.exit(main())
