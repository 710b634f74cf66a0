"""The ports of a cluster that `docs/cluster.md` lists, and those that are found open from another host."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
# A table's row whose first cell is a port or a range of them: | 6379 | ..., | `10002-19999` | ..., | 10002 to 19999 | ...
ROW = re.compile(r"^\|\s*`?(\d{2,5})(?:\s*(?:-|–|to)\s*(\d{2,5}))?`?\s*\|", re.MULTILINE)

# Run on another host: an address, then how many connections are tried at once. All ports; prints those that accept.
SCAN = """
import errno, select, socket, sys, time
address, at_once, found = sys.argv[1], int(sys.argv[2]), []
for start in range(1, 65536, at_once):
    waiting = {}
    for port in range(start, min(start + at_once, 65536)):
        one = socket.socket()
        one.setblocking(False)
        if one.connect_ex((address, port)) in (0, errno.EINPROGRESS):
            waiting[one.fileno()] = (one, port)
        else:
            one.close()
    poll, end = select.poll(), time.monotonic() + 5
    for descriptor in waiting:
        poll.register(descriptor, select.POLLOUT)
    while waiting and time.monotonic() < end:
        for descriptor, _ in poll.poll(1000):
            one, port = waiting.pop(descriptor)
            poll.unregister(descriptor)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(port)
            one.close()
    for one, _ in waiting.values():
        one.close()
print(*sorted(found))
"""


def listed() -> set[int]:
    """Ports that the page's tables name."""
    found: set[int] = set()
    for first, last in ROW.findall(PAGE.read_text()):
        found |= set(range(int(first), int(last or first) + 1))
    return found
