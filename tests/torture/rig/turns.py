"""Who of several machines makes the next request of their store: chosen by a seed, one at a time.

A machine is a thread that works on a repository through a `TakingTurns` store of its own. Between any two
requests it may be frozen for as long as hundreds of those of others, as a process that is stopped or a
machine that is suspended, or killed: the request was then made or not, and nothing that its threads do
afterwards reaches the store. Since nobody else moves while one does, a seed replays a run, as far as a
machine makes one request after the other.
"""

import contextlib
import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from random import Random

from replicated.store.base import Buffer, Capabilities, ObjectInfo, Store

#: Keys in a page of a listing: few, so that much happens between two pages.
PAGE_KEYS = 9


class Killed(BaseException):
    """The machine that makes this request is dead."""


@dataclasses.dataclass
class Luck:
    """How likely what is at a request."""

    freeze: float = 0.004
    #: Requests of others before a frozen machine goes on, at most.
    longest_freeze: int = 1500
    kill: float = 0.001


class Turns:
    """Lets one machine make one request, and then another one."""

    def __init__(self, seed: int, luck: Luck) -> None:
        self._random = Random(seed)
        self._luck = luck
        self._changed = threading.Condition()
        #: Requests that wait, by machine; a machine without one computes.
        self._waiting: dict[str, list[_Request]] = {}
        self._is_busy = False
        #: Until how many requests were made.
        self._frozen: dict[str, int] = {}
        self._is_over = False
        self.count = 0
        self.happened: Counter[str] = Counter()
        #: The last requests.
        self.history: deque[str] = deque(maxlen=400)

    def join(self, machine: str) -> None:
        """Announce a machine; nobody moves until it makes its first request."""
        with self._changed:
            self._waiting[machine] = []

    def leave(self, machine: str) -> None:
        """A machine makes no more requests."""
        with self._changed:
            del self._waiting[machine]
            self._frozen.pop(machine, None)
            self._changed.notify_all()

    @contextlib.contextmanager
    def request(self, machine: str, label: str) -> Iterator[bool]:
        """Inside, this machine alone makes a request; whether it is to die after it."""
        request = _Request(label)
        with self._changed:
            self._waiting[machine].append(request)
            self._changed.notify_all()
            self._changed.wait_for(lambda: request.fate or self._is_over)
            fate = request.fate
        if fate == "never":
            raise Killed
        try:
            if fate in ("", "dies before"):
                raise Killed
            yield fate == "dies after"
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def run(self, is_over: Callable[[], bool]) -> None:
        """Give turns until this holds, or nobody is left."""
        while not is_over():
            with self._changed:
                self._changed.wait_for(lambda: not self._is_busy and all(self._waiting.values()))
                if not self._waiting:
                    return
                self._thaw()
                machine = self._random.choice(sorted(self._waiting.keys() - self._frozen.keys()))
                if self._random.random() < self._luck.freeze:
                    self._frozen[machine] = self.count + self._random.randint(1, self._luck.longest_freeze)
                    self._note(machine, "is frozen")
                else:
                    self._let(machine)

    def calm(self) -> None:
        """From now on nobody is frozen or killed."""
        with self._changed:
            self._luck = Luck(0, 1, 0)
            self._frozen.clear()

    def stop(self) -> None:
        """Let whoever waits die."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _let(self, machine: str) -> None:
        """Let a machine make one of its requests."""
        requests = self._waiting[machine]
        request = min(requests, key=lambda one: one.label)
        requests.remove(request)
        self.count += 1
        self._note(machine, request.label)
        request.fate = "lives"
        if self._random.random() < self._luck.kill:
            request.fate = self._random.choice(["dies before", "dies after"])
            self._note(machine, request.fate)
            for other in requests:
                other.fate = "never"
            requests.clear()
        self._is_busy = True
        self._changed.notify_all()

    def _thaw(self) -> None:
        for machine, until in list(self._frozen.items()):
            if until <= self.count:
                del self._frozen[machine]
        if self._frozen.keys() == self._waiting.keys():
            del self._frozen[min(self._frozen, key=lambda machine: (self._frozen[machine], machine))]

    def _note(self, machine: str, what: str) -> None:
        self.happened[what.split(" ")[0]] += 1
        self.history.append(f"{self.count}: {machine} {what}")


@dataclasses.dataclass(eq=False)
class _Request:
    label: str
    #: `lives`, `dies before`, `dies after` or `never`; empty while it waits.
    fate: str = ""


class TakingTurns:
    """A store, each request of which waits for its turn; a listing is one request a page."""

    def __init__(self, store: Store, turns: Turns, machine: str, **capabilities: object) -> None:
        self._store = store
        self._turns = turns
        self._machine = machine
        self._capabilities = dataclasses.replace(store.capabilities, **capabilities)
        self._is_dead = False

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        with self._turn(f"put {key}"):
            self._store.put(key, parts, is_unique=is_unique, is_checked=is_checked)

    def replace(self, key: str, data: bytes) -> None:
        with self._turn(f"replace {key}"):
            self._store.replace(key, data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._turn(f"get {key}"):
            return self._store.get(key, offset, length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        last = ""
        while True:
            with self._turn(f"list {prefix} from {last or 'the beginning'}"):
                found = sorted(
                    (info for info in self._store.list(prefix) if info.key > last),
                    key=lambda info: info.key,
                )
            yield from found[:PAGE_KEYS]
            if len(found) <= PAGE_KEYS:
                return
            last = found[PAGE_KEYS - 1].key

    def delete(self, *keys: str) -> None:
        for key in keys:
            with self._turn(f"delete {key}"):
                self._store.delete(key)

    def exists(self, key: str) -> bool:
        with self._turn(f"exists {key}"):
            return self._store.exists(key)

    @contextlib.contextmanager
    def _turn(self, label: str) -> Iterator[None]:
        if self._is_dead:
            raise Killed
        try:
            with self._turns.request(self._machine, label) as is_last:
                yield
                if is_last:
                    raise Killed
        except Killed:
            self._is_dead = True
            raise
