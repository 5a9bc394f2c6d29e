"""A bucket on the loopback interface with the files of a directory as objects, far away and counting.

Only what a reader of such a bucket asks for: listing, and getting objects or ranges of them. Whoever asks is
let in.
"""

import os
import re
import threading
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from mounting import latency

BUCKET = "bucket"
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
#: As of an object that came in parts: it is no hash of the content, which nobody then computes.
_TAG = '"00000000000000000000000000000000-1"'
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Bucket:
    """Serves a directory from a thread until it is stopped."""

    def __init__(self, root: Path) -> None:
        self._server = _Server(root)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> int:
        """How many it has answered."""
        return self._server.requests

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _types: ClassVar = {"listing": "application/xml", "object": "application/octet-stream"}

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def _answer(self, *, with_body: bool) -> None:
        with self.server.lock:
            self.server.requests += 1
        asked = urlsplit(self.path)
        key = unquote(asked.path).removeprefix(f"/{BUCKET}").strip("/")
        if not key:
            query = {name: values[0] for name, values in parse_qs(asked.query).items()}
            listing = self._list(query.get("prefix", ""), query.get("delimiter", ""))
            latency.wait_for(len(listing))
            self._send(200, listing, "listing", {}, with_body)
            return
        path = self.server.root / key
        if not path.is_file():
            latency.wait_for(0)
            self._send(404, b"", "listing", {}, with_body)
            return
        size = path.stat().st_size
        begin, end = 0, size
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted:
            begin = int(wanted[1])
            end = min(size, int(wanted[2]) + 1) if wanted[2] else size
        about = {"Last-Modified": formatdate(path.stat().st_mtime, usegmt=True), "ETag": _TAG}
        if wanted:
            about["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        latency.wait_for(0)
        with path.open("rb") as file:
            file.seek(begin)
            self._send(206 if wanted else 200, b"", "object", about, with_body, length=end - begin)
            left = end - begin if with_body else 0
            with suppress(ConnectionError):  # who has read enough hangs up
                while left and (piece := file.read(min(left, latency.PIECE_BYTES))):
                    latency.wait_for_more(len(piece))
                    self.wfile.write(piece)
                    left -= len(piece)

    def _send(
        self, status: int, body: bytes, kind: str, about: dict[str, str], with_body: bool, length: int = -1
    ) -> None:
        self.send_response(status)
        for name, value in about.items():
            self.send_header(name, value)
        self.send_header("Content-Type", self._types[kind])
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _list(self, prefix: str, delimiter: str) -> bytes:
        """One page with everything: no directory of ours has more than a page holds."""
        folder = self.server.root / prefix
        lines = []
        found = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
        for entry in found:
            key = escape(prefix + entry.name)
            if entry.is_dir():
                lines.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
            else:
                status = entry.stat()
                lines.append(
                    f"<Contents><Key>{key}</Key><Size>{status.st_size}</Size>"
                    f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{_TAG}</ETag>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{_NAMESPACE}">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><Delimiter>{escape(delimiter)}</Delimiter>"
            f"<KeyCount>{len(lines)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{''.join(lines)}</ListBucketResult>"
        ).encode()
