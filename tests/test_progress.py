"""What people see of the work: lines in a log, a live area on a terminal, tables; never an exception of its own."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lvm_ray import progress
from lvm_ray.progress import bars, duration, say, stage, table


def test_a_log_gets_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("tokenize", total=9000, unit="pairs") as bar:
        bar.advance(4000, note="1 set aside")
        bar.set(9000)
    assert re.fullmatch(r"✓ tokenize +9,000 pairs  ·  0\.\d s  ·  1 set aside\n", capsys.readouterr().out)


def test_a_stage_that_fails_says_so_and_raises(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), stage("train", total=100, unit="steps") as bar:
        bar.set(40)
        raise KeyError("x")
    assert re.fullmatch(r"✗ train +failed  ·  40 / 100 steps  ·  0\.\d s\n", capsys.readouterr().out)


def test_a_long_stage_reports_while_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with stage("train", unit="steps") as bar:
        bar.total = 4.0  # found out later
        bar.set(1)
        time.sleep(0.01)
        bar.set(2)
        time.sleep(0.3)
    assert re.search(r"^· train +2 / 4 steps  ·  0\.\d s  ·  0\.\d s left$", capsys.readouterr().out, re.MULTILINE)


def test_time_left_ignores_what_a_resumed_run_had_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = progress.Bar("train", 1000, "steps")
    assert bar.seconds_left() is None
    now = 140.0  # start-up
    bar.set(500)  # resumed here
    assert bar.seconds_left() is None
    now = 150.0
    bar.advance(100)  # 0.1 s a step
    assert bar.seconds_left() == pytest.approx(40)
    now = 155.0
    assert bar.seconds_left() == pytest.approx(35)
    now = 200.0  # overdue: 100 steps in 60 s by now
    assert bar.seconds_left() == pytest.approx(240)
    bar.set(1000)
    assert bar.seconds_left() == 0


def test_many_threads_move_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def count() -> None:
        for _ in range(1000):
            bar.advance()

    with stage("count", total=8000, unit="things") as bar:
        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.done == 8000
    assert "8,000 things" in capsys.readouterr().out


def test_ascii_output_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with stage("Straße", total=2, unit="m²") as bar:
        bar.advance(2, note="→ done")
    say("naïve \x1b[31m")
    table("Größe", ["a"], [[None], [1.5]])
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert text.startswith("+ Stra?e") and "? done" in text and "na?ve ?[31m" in text and "  -\n" in text


def test_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    table("Balance", ["task", "pairs", "share"], [["pose", 1200, 1 / 3], ["derain", None, 12345.6], ["a [bold]", 7, 2.0]])
    assert capsys.readouterr().out.splitlines() == [
        "Balance",
        "  task      pairs   share",
        "  pose      1,200  0.3333",
        "  derain        –  12,346",
        "  a [bold]      7       2",
    ]


def test_bars_are_as_long_as_their_parts_and_told_apart_without_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [("pose", [("before", 0.8), ("after", 0.4)]), ("b", [("before", 0.001), ("after", 0.0)])]
    bars("Shares", groups, width=8)
    assert capsys.readouterr().out.splitlines() == [
        "Shares",
        "  pose  before  ░░░░░░░░ 80.0 %",
        "        after   ████ 40.0 %",
        "  b     before  ░ 0.1 %",
        "        after    0.0 %",
    ]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    bars("Shares", groups, width=8)
    sys.stdout.flush()
    assert "  pose  before  ........ 80.0 %\n        after   #### 40.0 %\n" in raw.getvalue().decode("ascii")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7440, "2 h 04 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


SHOW = """
import time
from lvm_ray.progress import say, stage, table
with stage("outer", total=2, unit="parts", ) as outer:
    with stage("inner", total=10, unit="steps") as inner:
        for _ in range(10):
            inner.advance(note="[red]loss 3.1")
            time.sleep(0.06)
    say("between")
    print("from a library")
    outer.advance(2)
table("Balance", ["task", "pairs"], [["pose", 1200]])
"""


TABLE = """
import time
from lvm_ray.progress import live_table, stage
rows = [[1, "T=2", "step 10 of 20"]]
with stage("trials", total=2, unit="trials") as bar, live_table("", ["trial", "settings", "state"], lambda: rows):
    time.sleep(0.4)
    rows = [[1, "T=2", "finished"], [2, "T=[red]3", "starts"]]
    time.sleep(0.4)
    bar.set(2)
"""


def on_a_terminal(tmp_path: Path, program: str = SHOW, **environment: str) -> str:
    """What a program writes to a terminal of its own."""
    script = tmp_path / "show.py"
    script.write_text(program)
    ours, theirs = pty.openpty()
    values = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    values |= {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    process = subprocess.Popen([sys.executable, str(script)], stdout=theirs, stderr=theirs, env=values)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(30) == 0, written.decode()
    return written.decode()


def test_a_terminal_shows_live_lines_and_keeps_finished_ones(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path, PYTHONIOENCODING="utf-8")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"inner +━+.* \d / 10 steps", plain)
    assert "\x1b[32m✓\x1b[0m inner" in text and "[red]loss 3.1" in plain
    lines = plain.replace("\r", "\n").splitlines()
    kept = [
        next(k for k, line in enumerate(lines) if line.startswith(start)) for start in ("✓ inner", "between", "from a", "✓ outer")
    ]
    assert kept == sorted(kept)
    assert re.search(r"pose +1,200", plain)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_a_table_is_drawn_again_in_place_and_goes_with_its_stage(tmp_path: Path) -> None:
    text = on_a_terminal(tmp_path, TABLE, PYTHONIOENCODING="utf-8")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.index("step 10 of 20") < plain.index("finished") and "T=[red]3" in plain
    assert "\x1b[1A\x1b[2K" in text  # lines are taken back
    assert plain.splitlines()[-1].startswith("✓ trials")
    dumb = on_a_terminal(tmp_path, TABLE, TERM="dumb", PYTHONIOENCODING="utf-8")
    assert "finished" not in dumb and "✓ trials" in dumb


def test_no_color_and_dumb_terminals_are_honoured(tmp_path: Path) -> None:
    plain = on_a_terminal(tmp_path, NO_COLOR="1", PYTHONIOENCODING="utf-8")
    assert "\x1b[32m" not in plain and "\x1b[91m" not in plain and "✓ inner" in plain
    dumb = on_a_terminal(tmp_path, TERM="dumb", PYTHONIOENCODING="ascii")
    assert "\x1b" not in dumb and "+ inner" in dumb


def test_a_remark_shows_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    say("s3://reader:hunter2@bucket/out: 3 lines")
    assert capsys.readouterr().out == "s3://***@bucket/out: 3 lines\n"
