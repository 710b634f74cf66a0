"""A headless Chromium, driven by the DevTools protocol through two pipes: pages are opened, keys are pressed, values are read.

Needs nothing but the standard library and a Chromium on this machine (`CHROMIUM`, None where there is none).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 30
KEYS = {"Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
TEXTS = {"Enter": "\r", "Escape": "", "Tab": ""}


class Browser:
    """One page at a time. `events` holds what the browser has said of it: requests, messages of the console, dialogs."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._process, self._to, self._back = process, to, back
        self._pending = b""
        self._number = 0
        self._session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something; its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                found: dict[str, Any] = answer["result"]
                return found
            self.events.append(answer)

    def open(
        self, path: Path, width: int = 1200, height: int = 900, media: dict[str, str] | None = None, scripts: bool = True
    ) -> None:
        """Show a page in a new tab, and forget what was said of others."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name, "value": value} for name, value in (media or {}).items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self._message())

    def of(self, method: str) -> list[dict[str, Any]]:
        """What the browser has said under this name."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def comes(self, expression: str, value: Any) -> bool:
        """Whether an expression has a value before long: some of what a page does follows a key a moment later."""
        end = time.monotonic() + SECONDS
        while self.value(expression) != value:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def press(self, *keys: str) -> None:
        """Press keys one after another, as a person would."""
        for key in keys:
            text = TEXTS.get(key, "" if key.startswith("Arrow") else key)
            named = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._back)

    def _message(self) -> dict[str, Any]:
        """The next message, which ends with a zero byte."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            piece = os.read(self._back, 1 << 16)
            assert piece, "the browser has ended"
            self._pending += piece
        text, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium for as long as the block lasts."""
    assert CHROMIUM
    theirs_to, to = (_high(end) for end in os.pipe())
    back, theirs_back = (_high(end) for end in os.pipe())
    # The protocol's pipes are the descriptors 3 and 4; no others are passed on.
    wire = f"import os, sys; os.dup2({theirs_to}, 3); os.dup2({theirs_back}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    options = [*QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", wire, CHROMIUM, *options], pass_fds=(theirs_to, theirs_back), stdout=log, stderr=log
        )
    os.close(theirs_to)
    os.close(theirs_back)
    running = Browser(process, to, back)
    try:
        yield running
    finally:
        running.close()


def _high(descriptor: int) -> int:
    """The same pipe under a number that is neither 3 nor 4."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
