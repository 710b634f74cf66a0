"""A stand-in for an object store that counts what it is asked: as much of S3's protocol as pyarrow uses, in memory.

Requests are what an object store is slow at, and a library may need several for one file.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class Store(ThreadingHTTPServer):
    """The objects by key, and the requests so far as (method, key)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def uri(self) -> str:
        return f"s3://key:secret@{BUCKET}?endpoint_override=127.0.0.1%3A{self.server_address[1]}&scheme=http&region=us-east-1"


@contextmanager
def running() -> Iterator[Store]:
    """A store that answers while the block runs."""
    store = Store()
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        """The key and the query of a request, which is counted."""
        place = urlsplit(self.path)
        key = unquote(place.path).removeprefix(f"/{BUCKET}").lstrip("/")
        self.server.requests.append((self.command, key))
        return key, parse_qs(place.query, keep_blank_values=True)

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        key, _ = self._asked()
        found = self.server.objects.get(key)
        if not key:
            self._answer(200)
        elif found is None:
            self._answer(404)
        else:
            self._answer(200, found, ETag=_tag(found), Last_Modified="Sat, 28 Nov 2026 00:00:00 GMT")

    def do_GET(self) -> None:
        key, query = self._asked()
        if not key:
            return self._list(query.get("prefix", [""])[0])
        found = self.server.objects.get(key)
        if found is None:
            return self._answer(404, _xml("<Error><Code>NoSuchKey</Code></Error>"))
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        part = found[int(span[1]) : int(span[2]) + 1] if span else found
        self._answer(206 if span else 200, part, ETag=_tag(found), Last_Modified="Sat, 28 Nov 2026 00:00:00 GMT")

    def _list(self, prefix: str) -> None:
        keys = [key for key in sorted(self.server.objects) if key.startswith(prefix)]
        listed = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.server.objects[key])}</Size>"
            "<LastModified>2026-11-28T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        text = f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
        self._answer(200, _xml(text))

    def do_PUT(self) -> None:
        key, query = self._asked()
        content = self._content()
        source = self.headers.get("x-amz-copy-source")
        if source:
            self.server.objects[key] = self.server.objects[unquote(source).lstrip("/").removeprefix(f"{BUCKET}/")]
            return self._answer(200, _xml("<CopyObjectResult><ETag>copy</ETag></CopyObjectResult>"))
        if "partNumber" in query:
            self.server.parts.setdefault(query["uploadId"][0], {})[int(query["partNumber"][0])] = content
        else:
            self.server.objects[key] = content
        self._answer(200, ETag=_tag(content))

    def do_POST(self) -> None:
        key, query = self._asked()
        self._content()
        if "uploads" in query:
            text = f"<InitiateMultipartUploadResult><UploadId>{_tag(key.encode())}</UploadId></InitiateMultipartUploadResult>"
            return self._answer(200, _xml(text))
        if "delete" in query:
            return self._answer(200, _xml("<DeleteResult></DeleteResult>"))
        parts = self.server.parts.pop(query["uploadId"][0])
        self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
        self._answer(200, _xml("<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"))

    def do_DELETE(self) -> None:
        key, _ = self._asked()
        self.server.objects.pop(key, None)
        self._answer(204)

    def _content(self) -> bytes:
        """The body, also where it comes in chunks with signatures, as the client likes to send it."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return _unsigned(body) if "aws-chunked" in (self.headers.get("Content-Encoding") or "") else body
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return _unsigned(body) if "aws-chunked" in (self.headers.get("Content-Encoding") or "") else body


def _unsigned(body: bytes) -> bytes:
    """A body without the client's own chunks of `size;chunk-signature=...`."""
    content = b""
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        content, body = content + body[:size], body[size + 2 :]
    return content


def _tag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _xml(text: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
