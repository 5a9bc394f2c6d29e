"""An HTTP proxy before an S3 or GCS server on loopback: it counts what passes, and breaks what it is told to.

Counting, for tests of request counts and for benchmarks (with the directory `tests` in `sys.path`, where
tests/conftest.py puts it):

    from servers.fault_proxy import FaultProxy

    with FaultProxy(server_url) as proxy:            # clients use proxy.url as their endpoint
        with proxy.counting() as counted:
            ...
        counted.total                                # requests
        counted.by_kind                              # Counter {("PUT", "packs"): 3, ("LIST", "log"): 2}
        counted.bytes_up, counted.bytes_down         # of bodies
        counted.of("PUT", "packs")                   # the requests, each with key, status and fault

The first word is the operation: PUT, GET, HEAD, LIST, DELETE (of one object or many), START, PART, COMPLETE
and ABORT of multipart uploads, and BUCKET for what is asked about a bucket. The second is the kind of key:
the directory of the repository (`packs`, `log/index`, `log/new`, `experiments`, ...; for LIST that of its
prefix), or `other`. A repository must not lie under a prefix that looks like one of these.

Breaking, with `faults`:

    rule = proxy.add(faults.reset_after, "PUT", r"packs/", nth=2)     # the second PUT of a pack, once
    proxy.add(faults.slow_down, probability=0.2, seed=7)              # one in five of all requests, for ever
    rule.hits                                                         # how often it struck
    proxy.clear()                                                     # well again; whoever hangs goes on
    proxy.lag_listings(3)                                             # new keys are not in three listings
    proxy.go_away(); proxy.come_back()                                # nothing listens on the port; and again

Requests are forwarded as they came, `Host` too, so signatures hold. Everything runs in threads of this
process; a request is read whole before anything is decided.
"""

import contextlib
import dataclasses
import http.client
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from servers.faults import Exchange, Fault, passing

_KIND = re.compile(
    r"(?:^|/)(repository\.json|log/(?:condemned|index|new|records)|log"
    r"|experiments|checkpoints|edits|heartbeats|shards|packs|index|snapshots)(?=/|$)"
)
_GOOGLE = re.compile(r"(?:/upload|/download)?(?:/resumable)?(?:/storage/v1)?/b/[^/]+/o(?:/(.*))?")
_MULTIPART = {"POST": "COMPLETE", "DELETE": "ABORT", "PUT": "PART", "GET": "LIST"}


class Rule:
    """When a fault strikes."""

    def __init__(
        self,
        fault: Fault,
        operations: frozenset[str],
        key: re.Pattern[str],
        *,
        nth: int,
        times: int | None,
        probability: float,
        seed: int,
    ) -> None:
        self.fault = fault
        #: How often it struck, and how many requests it looked at.
        self.hits = 0
        self.seen = 0
        self._operations = operations
        self._key = key
        self._nth = nth
        self._times = times
        self._probability = probability
        self._random = random.Random(seed)

    def strikes(self, exchange: Exchange) -> bool:
        if self._operations and exchange.operation not in self._operations:
            return False
        if not self._key.search(exchange.key):
            return False
        self.seen += 1
        is_due = self.seen >= self._nth and (self._times is None or self.hits < self._times)
        if not is_due or self._random.random() >= self._probability:
            return False
        self.hits += 1
        return True


@dataclasses.dataclass
class Counted:
    """The requests of a while."""

    exchanges: list[Exchange] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.exchanges)

    @property
    def by_kind(self) -> Counter[tuple[str, str]]:
        return Counter((exchange.operation, exchange.kind) for exchange in self.exchanges)

    @property
    def bytes_up(self) -> int:
        return sum(exchange.bytes_up for exchange in self.exchanges)

    @property
    def bytes_down(self) -> int:
        return sum(exchange.bytes_down for exchange in self.exchanges)

    def of(self, operation: str, kind: str = "") -> list[Exchange]:
        """Those of an operation, and of a kind of key if one is given."""
        return [
            exchange
            for exchange in self.exchanges
            if exchange.operation == operation and kind in ("", exchange.kind)
        ]


class FaultProxy:
    """Listens on loopback until it is closed; see the top of this file."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.is_closed = False
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        #: How often `clear` was called.
        self.clearings = 0
        self._counting: list[Counted] = []
        self._connections: set[socket.socket] = set()
        # Key -> listings that have yet to leave it out.
        self._lag = 0
        self._hidden: dict[str, int] = {}
        self._port_holder: socket.socket | None = None
        self._listen(0)
        self.port: int = self._server.server_address[1]
        #: Everything since the start.
        self.counted = Counted()
        self._counting.append(self.counted)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._end_listening()
            if self._port_holder is not None:
                self._port_holder.close()

    # Breaking.

    def add(
        self,
        fault: Fault,
        operations: str = "",
        key: str = "",
        *,
        nth: int = 1,
        times: int | None = None,
        probability: float = 1.0,
        seed: int = 0,
    ) -> Rule:
        """Let a fault strike: the first rule that matches a request has it.

        `operations`: words with spaces between them, all if empty; `key`: a regular expression that is found
        in the key; `nth`: from the n-th such request on, and once only when `nth` is said and `times` is not.
        """
        if times is None and nth > 1:
            times = 1
        rule = Rule(
            fault,
            frozenset(operations.split()),
            re.compile(key),
            nth=nth,
            times=times,
            probability=probability,
            seed=seed,
        )
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget every rule; those who hang go on."""
        with self._lock:
            self._rules.clear()
            self._lag = 0
            self._hidden.clear()
            self.clearings += 1

    def lag_listings(self, listings: int) -> None:
        """Leave keys that are put from now on out of the next so many listings that would show them."""
        with self._lock:
            self._lag = listings

    def go_away(self) -> None:
        """Refuse connections, and break those there are."""
        self._end_listening()
        # Bound but not listening: nobody else gets the port.
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port_holder.bind(("127.0.0.1", self.port))

    def come_back(self) -> None:
        """Listen again."""
        assert self._port_holder is not None
        self._port_holder.close()
        self._port_holder = None
        self._listen(self.port)

    # Counting.

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count the requests that come meanwhile."""
        counted = Counted()
        with self._lock:
            self._counting.append(counted)
        try:
            yield counted
        finally:
            with self._lock:
                self._counting = [one for one in self._counting if one is not counted]

    # For exchanges and the server.

    def serve(self, exchange: Exchange) -> None:
        with self._lock:
            for counted in self._counting:
                counted.exchanges.append(exchange)
            rule = next((rule for rule in self._rules if rule.strikes(exchange)), None)
        fault = rule.fault if rule else passing
        exchange.fault = rule.fault.__name__ if rule else ""
        try:
            fault(exchange)
        except (OSError, http.client.HTTPException):
            # Either side is gone.
            exchange.reset()
        finally:
            exchange.body = b""

    def note_applied(self, exchange: Exchange) -> None:
        if exchange.operation in ("PUT", "COMPLETE"):
            with self._lock:
                if self._lag:
                    self._hidden.setdefault(exchange.key, self._lag)

    def hide_new(self, listing: bytes) -> bytes:
        """A listing without what lags."""
        shown = 0

        def choose(match: re.Match[str]) -> str:
            nonlocal shown
            key = unquote(re.sub(r".*<Key>(.*?)</Key>.*", r"\1", match.group(), flags=re.DOTALL))
            left = self._hidden.get(key, 0)
            if left:
                self._hidden[key] = left - 1
                return ""
            shown += 1
            return match.group()

        with self._lock:
            if not any(self._hidden.values()):
                return listing
            text = re.sub(r"<Contents>.*?</Contents>", choose, listing.decode(), flags=re.DOTALL)
            return re.sub(r"<KeyCount>\d+</KeyCount>", f"<KeyCount>{shown}</KeyCount>", text).encode()

    def keep(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def drop(self, connection: socket.socket, *, is_reset: bool = False) -> None:
        """End a connection, whoever waits for it."""
        with self._lock:
            self._connections.discard(connection)
        with contextlib.suppress(OSError):
            if not is_reset:
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _listen(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def _end_listening(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            self.drop(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Threads that wait for a client are ended by their connections.
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever is gone is gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.proxy.keep(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.server.proxy.drop(self.connection)

    def handle_one_request(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            exchange = self._read_exchange()
            self.server.proxy.serve(exchange)
        except (OSError, ValueError):
            self.close_connection = True
            return
        self.close_connection |= exchange.is_last

    def _read_exchange(self) -> Exchange:
        body = self._read_body()
        operation, key = _describe(self.command, self.path, body)
        kind = _KIND.search(key.partition("\n")[0])
        return Exchange(
            operation=operation,
            kind=kind.group(1) if kind else "other",
            key=key,
            method=self.command,
            target=self.path,
            headers=list(self.headers.items()),
            body=body,
            proxy=self.server.proxy,
            connection=self.connection,
            bytes_up=len(body),
        )

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self._read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self._read(int(self.headers.get("Content-Length") or 0))

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the client is gone")
        return data

    def log_message(self, *_: object) -> None:
        pass


def _describe(method: str, target: str, body: bytes) -> tuple[str, str]:
    """The operation and the key of a request, of S3 with the bucket in the path, or of GCS."""
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    google = re.fullmatch(
        r"(?:/upload|/download)?(?:/storage/v1|/resumable)?/b/[^/]+/o(?:/(.*))?", parts.path
    )
    if google:
        key = unquote(google.group(1) or query.get("name") or query.get("prefix", ""))
        if google.group(1) is None and method == "GET":
            return "LIST", key
        return ("PUT" if method == "POST" else method), key
    _, _, key = parts.path.removeprefix("/").partition("/")
    key = unquote(key)
    if not key:
        if method == "GET" and ("prefix" in query or "list-type" in query):
            return "LIST", query.get("prefix", "")
        if method == "POST" and "delete" in query:
            return "DELETE", "\n".join(re.findall(r"<Key>(.*?)</Key>", body.decode()))
        return "BUCKET", ""
    if method == "POST" and "uploads" in query:
        return "START", key
    if "uploadId" in query:
        return _MULTIPART[method], key
    return method, key
