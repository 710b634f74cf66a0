"""A Ray cluster's dashboard over HTTP: found, made sure that it asks for a token, and asked.

Without Ray itself, whose client takes seconds to import and waits for ever for a host that does not answer. The token comes from
where Ray looks for it (RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token), is sent to the cluster alone, in a
header, and appears in no message. No redirect is followed and no proxy is used, since they would see it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lvm_ray import __version__
from lvm_ray.cluster.arrival import IMAGE
from lvm_ray.errors import UserError
from lvm_ray.progress import say
from lvm_ray.storage import has_credentials, redacted

ADDRESS, DEFAULT = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"
ANSWERS = 6.0  # seconds, to the first question
PATIENCE = 30.0  # seconds, to any other
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TUNNEL = "check --address; to a cluster elsewhere open a tunnel first: ssh -L 8265:127.0.0.1:8265 HEAD"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Cluster:
    """A dashboard's URL and its token, which nothing prints."""

    url: str
    token: str | None = field(default=None, repr=False)


def address_of(address: str | None) -> str:
    """The URL of the dashboard: what is given, else RAY_API_SERVER_ADDRESS, else that of this machine.

    Raises UserError where it is none.
    """
    found = address or os.environ.get(ADDRESS) or DEFAULT
    url = (found if "://" in found else f"http://{found}").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if has_credentials(url) or not usable or parts.username:
        raise UserError(f"--address {redacted(found)}: give the dashboard's URL, as {DEFAULT} (a token: RAY_AUTH_TOKEN_PATH)")
    return url


def connect(address: str | None) -> Cluster:
    """The cluster at an address, which lets nobody in but by a token, and us by ours.

    Raises UserError within seconds where nothing answers there, where everybody is let in, where our token is refused, and where
    another Ray runs there than this package is made for.
    """
    return _entered(address_of(address), *read_token())


@cache
def _entered(url: str, token: str | None, source: str) -> Cluster:
    status, _ = _within(ANSWERS + 2, url, lambda: ask(Cluster(url), "GET", "/api/version", seconds=ANSWERS))
    if status == 200:
        raise UserError(
            f"{url}: answers without a token, so anybody who reaches it can run programs there: start that cluster with "
            "RAY_AUTH_MODE=token, as the files of cluster/ do"
        )
    if status not in (401, 403):
        raise UserError(f"{url}: no Ray dashboard (it answers {status} to /api/version): {TUNNEL}")
    if token is None:
        raise UserError(f"{url}: asks for a token, and there is none here: set RAY_AUTH_TOKEN_PATH to a file with the cluster's")
    cluster = Cluster(url, token)
    status, body = ask(cluster, "GET", "/api/version", seconds=ANSWERS)
    if status in (401, 403):
        raise UserError(f"{url}: refuses the token from {source}: set RAY_AUTH_TOKEN_PATH to a file with this cluster's own")
    _require_same_ray(url, status, body)
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        say(f"warning: {url}: the token goes there unencrypted: better use a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD) or https")
    return cluster


def _require_same_ray(url: str, status: int, body: bytes) -> None:
    ours = version("ray")
    try:
        theirs = str(json.loads(body)["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url}: no Ray dashboard (it answers {status} to /api/version): {TUNNEL}") from None
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(f"{url}: runs Ray {theirs}, and this lvm-ray is made for {ours}: {IMAGE}")


def read_token() -> tuple[str | None, str]:
    """The token and where it comes from; None where there is none. Raises UserError where what should be one cannot be."""
    if found := os.environ.get("RAY_AUTH_TOKEN"):
        return _checked(found, "RAY_AUTH_TOKEN"), "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not named and not path.is_file():
        return None, ""
    source = f"RAY_AUTH_TOKEN_PATH ({path})" if named else str(path)
    try:
        return _checked(path.read_text(encoding="ascii"), source), source
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{source}: cannot read the token: {reason}") from None


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{source}: holds no token: one word of letters and digits, as `ray get-auth-token --generate` makes it")
    return token


def ask(cluster: Cluster, method: str, path: str, body: bytes | None = None, seconds: float = PATIENCE) -> tuple[int, bytes]:
    """Status and body of the answer to a request. Raises UserError where none comes."""
    parts = urlsplit(cluster.url)
    headers = {"User-Agent": f"lvm-ray/{__version__}"} | ({"Authorization": f"Bearer {cluster.token}"} if cluster.token else {})
    if body is not None:
        headers["Content-Type"] = "application/json" if path.startswith("/api/jobs") else "application/octet-stream"
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    try:
        connection.request(method, parts.path + path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, HTTPException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(f"{cluster.url}: no Ray dashboard answers ({reason}): {TUNNEL}") from None
    finally:
        connection.close()


def ask_values(cluster: Cluster, method: str, path: str, values: Any = None) -> Any:
    """The plain values that a request is answered with; None where there is no such thing.

    Raises UserError where the answer is a refusal, with its last line.
    """
    status, body = ask(cluster, method, path, None if values is None else json.dumps(values).encode())
    if status == 404:
        return None
    if status != 200:
        text = body.decode(errors="replace").strip().splitlines() or [""]
        raise UserError(f"{cluster.url}: refuses {method} {path} ({status}): {redacted(text[-1])[:300]}")
    try:
        return json.loads(body)
    except ValueError:
        raise UserError(f"{cluster.url}: answers {method} {path} with something else than Ray does: {TUNNEL}") from None


def _within(seconds: float, url: str, question: Callable[[], Answer]) -> Answer:
    """A question's answer, also where looking up the host's name takes longer than any limit on the connection."""
    found: list[Answer] = []
    problems: list[Exception] = []

    def work() -> None:
        try:
            found.append(question())
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if problems:
        raise problems[0]
    if not found:
        raise UserError(f"{url}: no answer within {seconds:.0f} s: {TUNNEL}")
    return found[0]
