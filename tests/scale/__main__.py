"""Compute docs/scale.md and its pictures anew: `make scale`. Takes seconds; what it measures is in `tests/scale/measure.py`."""

from __future__ import annotations

from tests.scale import charts, page


def main() -> None:
    page.write()
    charts.write()
    print(f"{page.PAGE}, {charts.FOLDER}")


if __name__ == "__main__":
    main()
