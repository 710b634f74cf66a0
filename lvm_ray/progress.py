"""What a person sees while lvm-ray works: one line a stage, short remarks, plain tables.

    with stage("tokenize", total=9000, unit="pairs") as bar:
        bar.advance(32, note="2 set aside")
    say("the loss is below the floor")
    table("Balance", ["task", "pairs"], [["pose", 1200]])
    with live_table("trials", ["trial", "state"], lambda: [[1, "running"]]):
        ...
    bars("Shares", [("pose", [("before", 0.1), ("after", 0.5)])])

On a terminal a running stage is one live line (name, bar, done / total, time, time left, note), and stays as a finished
line with a check mark, or with a cross where it failed. Elsewhere (a log file, a pipe) a stage is one line when it ends,
and one a minute while it runs. Colours are few and obey NO_COLOR; where the output's encoding is not Unicode,
everything is ASCII. All functions may be called from any thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from lvm_ray.observe import prometheus
from lvm_ray.storage import redacted

LINE_EVERY = 60.0  # seconds between two lines of a running stage where the output is not a terminal
NAME_WIDTH = 14
WIDE = 110  # columns of a terminal


class Bar:
    """The progress of one stage; made by `stage`."""

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        # `total` may be set later, where the work itself finds out how much there is.
        self.name, self.total, self.unit = name, total, unit
        self.done: float = 0
        self.bad = 0  # items that the work has set aside
        self.over = False
        self.note = ""
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._first: tuple[float, float] | None = None  # (time, done) of the first report
        self._last: tuple[float, float] | None = None
        self._end: float | None = None  # when the work itself expects to be over

    def advance(self, n: float = 1, note: str = "") -> None:
        """`n` more are done. An empty note leaves the note as it is."""
        with self._lock:
            self._report(self.done + n, note)

    def set(self, done: float, note: str = "", left: float | None = None) -> None:
        """`done` are done in all. An empty note leaves the note as it is. `left`: seconds to the end, where the work knows."""
        with self._lock:
            self._report(done, note)
            self._end = None if left is None else time.monotonic() + left

    def _report(self, done: float, note: str) -> None:
        self.done = done
        self.note = note or self.note
        self._last = (time.monotonic(), done)
        self._first = self._first or self._last

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """What the work itself says, until that is over, else an estimate from the pace since the first report, so that neither
        start-up nor a resumed run's past counts."""
        with self._lock:
            if self._end is not None and self._end > time.monotonic():
                return self._end - time.monotonic()
            if self.total is None or self._first is None or self._last is None or self._last[1] <= self._first[1]:
                return None
            done, now = self._last[1] - self._first[1], time.monotonic()
            left = (self._last[0] - self._first[0]) / done * (self.total - self._last[1]) - (now - self._last[0])
            # Overdue: what is being done takes longer than what went before, so the wait itself counts towards the pace.
            return left if left > 0 else (now - self._first[0]) / done * (self.total - self._last[1])


@contextmanager
def stage(name: str, total: float | None = None, unit: str = "") -> Iterator[Bar]:
    """Show a stage of the work while the block runs, and how it ended. `total` None: nobody knows how much there is."""
    bar = Bar(name, total, unit)
    _display.begin(bar)
    prometheus.show(bar)
    try:
        yield bar
    except BaseException:
        _display.end(bar, failed=True)
        raise
    finally:
        bar.over = True
    _display.end(bar, failed=False)


def say(text: str) -> None:
    """One remark on its own line, above the live lines, without credentials of URIs in it."""
    _display.print(Text(redacted(text)))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table under its title. Integers get thousands separators, other numbers four significant digits, None a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = _right_aligned(columns, rows)
    if not is_live():
        _display.print(Text(plain_table(title, columns, cells, right)))
        return
    _display.print(_drawn_table(title, columns, cells, right))


@contextmanager
def live_table(title: str, columns: Sequence[str], rows: Callable[[], Sequence[Sequence[Any]]]) -> Iterator[None]:
    """Show a table above the running stages while the block runs, drawn again and again from what `rows` gives; it must be quick.

    Where the output is not a terminal nothing is shown.
    """

    def draw() -> Table:
        now = rows()
        return _drawn_table(title, columns, [[_cell(value) for value in row] for row in now], _right_aligned(columns, now))

    _display.drawings.append(draw)
    try:
        yield
    finally:
        _display.drawings.remove(draw)


def _right_aligned(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    return [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(columns))]


def _drawn_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> Table:
    drawn = Table(
        *(Column(Text(name), justify="right" if to_right else "left") for name, to_right in zip(columns, right, strict=True)),
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        header_style="dim",
    )
    for row in cells:
        drawn.add_row(*(Text(_printable(cell)) for cell in row))
    return drawn


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], width: int = 40) -> None:
    """Bars of parts (0..1) under a title, in groups: `[("pose", [("before", 0.1), ("after", 0.5)])]`.

    The longest bar is `width` letters long, and what is more than nothing is at least one. Told apart without colour: a
    group's last bar is full, those before it are light.
    """
    full, light = _symbol("█", "#"), _symbol("░", ".")
    parts = [part for _, members in groups for _, part in members]
    longest = max([part for part in parts if part > 0], default=1.0)
    name_width = max((len(name) for name, _ in groups), default=0)
    label_width = max((len(label) for _, members in groups for label, _ in members), default=0)
    lines = [title]
    for name, members in groups:
        for place, (label, part) in enumerate(members):
            fill = full if place == len(members) - 1 else light
            drawn = fill * max(round(width * part / longest), int(part > 0))
            shown = f"{100 * part:.1f} %"
            lines.append(f"  {name if place == 0 else '':{name_width}}  {label:{label_width}}  {drawn} {shown}")
    _display.print(Text("\n".join(lines)))


def plain_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """The table as aligned lines of text; `right` says which columns are aligned to the right."""
    lines = [list(columns), *cells]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]

    def joined(line: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        return ("  " + "  ".join(padded)).rstrip()

    return "\n".join([title, *(joined(line) for line in lines)])


def duration(seconds: float) -> str:
    """A length of time for people: `0.4 s`, `12 s`, `3 min 05 s`, `1 h 04 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


class _Display:
    """The one owner of the terminal: rich allows a single live area, which all running stages share."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.drawings: list[Callable[[], Table]] = []  # above the live area's stages
        self._live: Progress | None = None
        self._tasks: dict[Bar, TaskID] = {}
        self._ends: dict[Bar, threading.Event] = {}

    def begin(self, bar: Bar) -> None:
        with self._lock:
            if not is_live():
                self._ends[bar] = threading.Event()
                threading.Thread(target=self._every_minute, args=(bar, self._ends[bar]), daemon=True).start()
                return
            if self._live is None:
                console = _console()
                bar_width = 20 if console.width >= WIDE else 8  # the note says more than the bar
                columns = (_Name(), BarColumn(bar_width=bar_width), _Numbers())
                self._live = _Live(self.drawings, *columns, console=console, transient=True, refresh_per_second=4)
                self._live.start()
            self._tasks[bar] = self._live.add_task(bar.name, total=bar.total, bar=bar)

    def end(self, bar: Bar, failed: bool) -> None:
        with self._lock:
            if bar in self._ends:
                self._ends.pop(bar).set()
            if self._live is not None and bar in self._tasks:
                self._live.remove_task(self._tasks.pop(bar))
                if not self._tasks:  # the live area closes before the line is printed, or a blank line would stay
                    self._live.stop()
                    self._live = None
            mark, style = (_symbol("✗", "x"), "red") if failed else (_symbol("✓", "+"), "green")
            self.print(Text.assemble((mark, style), f" {_name(bar)} ", _finished(bar, failed)))

    def print(self, content: Text | Table) -> None:
        with self._lock:
            console = self._live.console if self._live else _console()
            if isinstance(content, Text):
                content = _printable_text(content)
            # Cropping or folding belongs to terminals: a log keeps whole lines.
            console.print(content, soft_wrap=isinstance(content, Text), highlight=False)
            console.file.flush()

    def _every_minute(self, bar: Bar, end: threading.Event) -> None:
        while not end.wait(LINE_EVERY):
            with self._lock:
                if not end.is_set():
                    self.print(Text(f"{_symbol('·', '.')} {_name(bar)} {_running(bar)}"))


class _Live(Progress):
    """The live area: drawings, then a line for each running stage."""

    def __init__(self, drawings: Sequence[Callable[[], Table]], *columns: ProgressColumn, **options: Any) -> None:
        self._drawings = drawings
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from (draw() for draw in tuple(self._drawings))
        yield from super().get_renderables()


class _Name(ProgressColumn):
    max_refresh = None

    def render(self, task: RichTask) -> Text:
        bar: Bar = task.fields["bar"]
        # Rich draws from `task`; the numbers live in our Bar, which any thread may have moved since the last frame.
        task.completed, task.total = bar.done, bar.total
        return _printable_text(Text("  " + _name(bar)))


class _Numbers(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return _printable_text(Text(_running(task.fields["bar"], "  "), style="dim", no_wrap=True, overflow="crop"))


_display = _Display()


def _console() -> Console:
    """A console on today's stdout: tests and notebooks exchange it."""
    return Console(file=_stdout(), highlight=False, emoji=False, markup=False)


def _stdout() -> TextIO:
    """The real stdout: while stages are live, rich's stand-in for it knows neither encoding nor terminal."""
    real: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return real


def is_live() -> bool:
    return _stdout().isatty() and os.environ.get("TERM") != "dumb"


def _encoding() -> str:
    return getattr(_stdout(), "encoding", None) or "ascii"


def _name(bar: Bar) -> str:
    return bar.name.ljust(NAME_WIDTH)


def _amount(bar: Bar, finished: bool) -> str:
    """`32 / 9,000 pairs`; of a finished stage `9,000 pairs`; empty where there is nothing to count."""
    if bar.total is None and (not bar.done or not bar.unit):
        return ""
    unit = f" {bar.unit}" if bar.unit else ""
    complete = bar.total is None or (finished and bar.done == bar.total)
    return f"{_cell(bar.done)}{unit}" if complete else f"{_cell(bar.done)} / {_cell(bar.total)}{unit}"


def _running(bar: Bar, separator: str = "") -> str:
    left = bar.seconds_left()
    remaining = None if left is None else f"{duration(left)} left"
    return _joined([_amount(bar, finished=False), duration(bar.seconds), remaining, bar.note], separator)


def _finished(bar: Bar, failed: bool) -> str:
    return _joined(["failed" if failed else None, _amount(bar, finished=not failed), duration(bar.seconds), bar.note])


def _joined(parts: Sequence[str | None], separator: str = "") -> str:
    return (separator or _symbol("  ·  ", "  ")).join(part for part in parts if part)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return not value or value in "-\u2013" or value.lstrip("+-")[:1].isdigit()
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return _symbol("\u2013", "-")
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,.0f}"
    return str(value)


def _is_unicode() -> bool:
    return _encoding().lower().startswith("utf")


def _symbol(unicode: str, ascii: str) -> str:
    return unicode if _is_unicode() else ascii


def _printable(text: str) -> str:
    """The text without characters that the output cannot encode, and without control characters of hostile names."""
    kept = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text).replace("·", _symbol("·", "."))
    return kept.encode(_encoding(), "replace").decode(_encoding())


def _printable_text(text: Text) -> Text:
    # Replacing characters one by one keeps the length, so styles stay where they are.
    clean = text.copy()
    clean.plain = _printable(text.plain)
    return clean
