"""Lets real code go on one call of a store at a time, and die between any two of them."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from replicated.store.base import Capabilities, ObjectInfo
from replicated.store.memory import MemoryStore

DEADLINE_S = 60.0


class Killed(BaseException):
    """The machine is gone."""


class Gate:
    """What the calls of one machine have to pass. Open unless it is `closed`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_killed = False
        self._tokens = 0
        self._waiting = 0

    def pass_through(self) -> None:
        with self._changed:
            if not self._is_closed:
                return
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._tokens or self._is_killed or not self._is_closed)
            self._waiting -= 1
            if self._is_killed:
                raise Killed
            if self._is_closed:
                self._tokens -= 1

    def close(self) -> None:
        with self._changed:
            self._is_closed, self._is_killed, self._tokens = True, False, 0

    def open(self, *, killing: bool = False) -> None:
        with self._changed:
            self._is_killed = killing
            self._is_closed = killing
            self._changed.notify_all()

    def let_one_through(self, is_over: Callable[[], bool]) -> None:
        """Let one call through, and wait for the next one, or for the end."""
        with self._changed:
            self._tokens += 1
            self._changed.notify_all()
            assert self._changed.wait_for(
                lambda: is_over() or (self._tokens == 0 and self._waiting), DEADLINE_S
            )

    def tell(self) -> None:
        with self._changed:
            self._changed.notify_all()


class SteppedStore:
    """A machine's way to the store that all of them share."""

    def __init__(self, shared: MemoryStore, gate: Gate, capabilities: Capabilities) -> None:
        self._shared = shared
        self._gate = gate
        self.capabilities = capabilities
        self.url = shared.url

    def put(self, *args: Any, **options: Any) -> None:
        self._gate.pass_through()
        self._shared.put(*args, **options)

    def replace(self, key: str, data: bytes) -> None:
        self._gate.pass_through()
        self._shared.replace(key, data)

    def get(self, *args: Any) -> bytes:
        self._gate.pass_through()
        return self._shared.get(*args)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Page by page."""
        last = ""
        while True:
            self._gate.pass_through()
            after = sorted(
                (info for info in self._shared.list(prefix) if info.key > last), key=lambda i: i.key
            )
            if not after:
                return
            # Pages of a few objects: what is listed early may be old when the last page comes.
            for info in after[:4]:
                yield info
                last = info.key
            if len(after) <= 4:
                return

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._gate.pass_through()
            self._shared.delete(key)

    def exists(self, key: str) -> bool:
        self._gate.pass_through()
        return self._shared.exists(key)


class Task:
    """Something that a machine does, step by step."""

    def __init__(self, gate: Gate, action: Callable[[], None]) -> None:
        self._gate = gate
        self.error: BaseException | None = None
        self.is_over = False
        gate.close()
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self.error = error
        self.is_over = True
        self._gate.tell()

    def step(self) -> None:
        if not self.is_over:
            self._gate.let_one_through(lambda: self.is_over)

    def finish(self, *, killing: bool = False) -> None:
        self._gate.open(killing=killing)
        self._thread.join(DEADLINE_S)
        assert self.is_over
        self._gate.open()
