"""Runs every fault case and writes `runs/faults.json`: [{"case", "outcome", "ok"}]. `make faults`.

Too slow for `make test`: each case starts and kills whole runs of the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.faults import tokenizing

OUT = Path("runs/faults.json")


def main() -> int:
    cases = []
    for case in tokenizing.cases():
        cases.append(case)
        print(f"{'ok  ' if case['ok'] else 'FAIL'} {case['case']}: {case['outcome']}", flush=True)
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(cases, indent=1) + "\n")
    return 0 if all(case["ok"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
