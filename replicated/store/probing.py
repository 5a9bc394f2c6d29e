"""Tries a store out: does it do what is promised to those who use it, and what follows where it does not?

Servers that speak S3 differ, buckets have policies, and clocks are wrong: `replicate doctor` shows what is
found here, `probe_store` says it as data. Everything is put below `probe/` under names of its own and is
deleted in the end; no bucket and no root directory is made. Each check is run, whatever the others found.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

from replicate.errors import ReplicateError, RepositoryDamaged, RepositoryMissing
from replicate.ids import new_id
from replicated.store.base import KeyMissing, Store, StoreBusy

Outcome = Literal["ok", "warn", "fail"]

PREFIX: Final = "probe/"
LARGE_BYTES: Final = 8 << 20
#: Signatures of S3 are refused when the clocks differ by 15 minutes.
CLOCK_WARN_S: Final = 30.0
CLOCK_FAIL_S: Final = 600.0

_SMALL: Final = bytes(range(256)) * 16
_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    outcome: Outcome
    #: For programs: a word, always one of few for each name (`honoured`, `ignored`, `refused`), or a number.
    value: str
    detail: str
    #: What follows from it, or what to do about it.
    hint: str = ""


class Trials(Protocol):
    """What only a trial asks of a store; stores whose servers may differ in it have them."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Put under the condition that there is no such object; whether the server said that it did."""
        ...

    def put_damaged(self, key: str, data: bytes) -> bool:
        """Put with the checksum of other bytes; whether the server takes that."""
        ...

    def get_tail(self, key: str, length: int) -> bytes:
        """The last bytes of an object, by a range that counts from its end."""
        ...

    def clock_ahead_s(self) -> float | None:
        """Seconds that the server's clock is ahead of ours, to about one; None when it does not tell."""
        ...


@runtime_checkable
class TriedStore(Protocol):
    """A store that has trials."""

    @property
    def trials(self) -> Trials:
        """Without repetitions; errors are those of the store."""
        ...


@runtime_checkable
class StoreAbove(Protocol):
    """A store that passes on to another one what is asked of it."""

    @property
    def below(self) -> Store:
        """The other one."""
        ...


def probe_store(store: Store, *, is_thorough: bool = True) -> Iterator[Finding]:
    """What was tried and what came of it, in order; `is_thorough`: also what takes some seconds.

    Failures are findings. A store that cannot be listed is not written to.
    """
    probe = _Probe(store)
    reached = list(_tried("reachable", probe.reach))
    yield from reached
    if any(finding.outcome == "fail" or finding.value == "missing" for finding in reached):
        return
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("write", probe.write),
        ("conditional write", probe.condition),
        ("listing", probe.listing),
        ("ranged read", probe.ranges),
        ("suffix read", probe.suffix),
        ("checksum", probe.checksum),
        ("overwrite", probe.overwriting),
        ("clock", probe.clock),
        ("large object", probe.large),
        ("delete", probe.deletion),
    ]
    try:
        for name, check in checks:
            if name == "large object" and not is_thorough:
                continue
            found = list(_tried(name, check))
            yield from found
            if name == "write" and found[0].outcome == "fail":
                return
    finally:
        probe.clean_up()


def _tried(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except RepositoryMissing as error:
        yield Finding(name, "warn", "missing", error.message, error.hint)
    except ReplicateError as error:
        yield Finding(name, "fail", "error", error.message, error.hint)
    except KeyMissing as error:
        hint = "what was stored must be there at once: nothing can be stored here safely"
        yield Finding(name, "fail", "lost", f"{error.key} was written and cannot be read", hint)


def _find_trials(store: Store) -> Trials | None:
    while not isinstance(store, TriedStore):
        if not isinstance(store, StoreAbove):
            return None
        store = store.below
    return store.trials


class _Probe:
    """The checks, each a method that yields findings; what they put is remembered."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._trials = _find_trials(store)
        self._prefix = f"{PREFIX}{new_id()[:16]}/"
        self._made: list[str] = []
        root = store.capabilities.local_root
        self._has_temporaries = root is not None and (root / "tmp").exists()

    def reach(self) -> Iterator[Finding]:
        began = time.perf_counter()
        self._list(self._prefix)
        took_ms = (time.perf_counter() - began) * 1000
        for _ in range(_ROUNDS - 1):
            began = time.perf_counter()
            self._store.exists(self._prefix + "nothing")
            took_ms = min(took_ms, (time.perf_counter() - began) * 1000)
        yield Finding("reachable", "ok", f"{took_ms:.1f}", f"{self._store.url} answers in {took_ms:.1f} ms")

    def write(self) -> Iterator[Finding]:
        key = self._new("write")
        self._store.put(key, [_SMALL], is_unique=True)
        if self._store.get(key) == _SMALL:
            yield Finding("write", "ok", "works", "an object was written and read back")
        else:
            yield _other_bytes("write")

    def condition(self) -> Iterator[Finding]:
        key = self._new("condition")
        name = "conditional write"
        try:
            is_honoured = self._is_second_refused(key)
        except StoreBusy:
            raise
        except ReplicateError as error:
            hint = "nothing depends on conditional writes"
            yield Finding(name, "ok", "refused", f"the server does not take them: {error.message}", hint)
            return
        if not is_honoured:
            hint = "nothing depends on conditional writes"
            yield Finding(name, "ok", "ignored", "a second writer of the same key overwrites the first", hint)
        elif self._store.get(key) == b"first":
            yield Finding(name, "ok", "honoured", "a second writer of the same key is refused")
        else:
            yield _other_bytes(name)

    def _is_second_refused(self, key: str) -> bool:
        if self._trials is not None:
            if not self._trials.put_new(key, b"first"):
                raise RepositoryDamaged(f"the server says that a new key is taken: {key}")
            return not self._trials.put_new(key, b"second")
        self._store.put(key, [b"first"])
        try:
            self._store.put(key, [b"second"])
        except RepositoryDamaged:
            return True
        return False

    def listing(self) -> Iterator[Finding]:
        missed = shown = 0
        for number in range(_ROUNDS):
            key = self._new(f"listing/{number}")
            self._store.put(key, [_SMALL], is_unique=True, is_checked=False)
            missed += key not in self._list(self._prefix)
        for number in range(_ROUNDS):
            key = f"{self._prefix}listing/{number}"
            try:
                self._store.delete(key)
            except ReplicateError:
                break  # Told by `deletion`.
            shown += key in self._list(self._prefix)
        hint = "gc must stay off here: it could delete what others have just stored"
        if missed:
            detail = f"{missed} of {_ROUNDS} new objects were not in a listing right after they were written"
            yield Finding("listing", "warn", "lags", detail, hint)
        elif shown:
            detail = f"{shown} of {_ROUNDS} deleted objects were still in a listing right after"
            yield Finding("listing", "warn", "lags", detail, hint)
        else:
            yield Finding("listing", "ok", "at once", "new objects are listed at once, deleted ones are not")

    def ranges(self) -> Iterator[Finding]:
        key = self._new("ranges")
        self._store.put(key, [_SMALL], is_unique=True, is_checked=False)
        size = len(_SMALL)
        wrong = [
            what
            for what, offset, length in (
                ("in the middle", 100, 50),
                ("from the middle on", 100, None),
                ("across the end", size - 10, 100),
                ("beyond the end", size + 5, 10),
            )
            if self._store.get(key, offset, length)
            != _SMALL[offset : size if length is None else offset + length]
        ]
        if wrong:
            hint = "mounts and checkouts read parts of objects: they cannot work here"
            yield Finding("ranged read", "fail", "wrong", f"other bytes came back: {', '.join(wrong)}", hint)
            return
        yield Finding("ranged read", "ok", "right", "parts of an object are read right")

    def suffix(self) -> Iterator[Finding]:
        if self._trials is None:
            return
        key = self._new("suffix")
        self._store.put(key, [_SMALL], is_unique=True, is_checked=False)
        try:
            is_right = self._trials.get_tail(key, 10) == _SMALL[-10:]
        except StoreBusy:
            raise
        except ReplicateError:
            is_right = False
        detail = "are read right" if is_right else "are not: nothing depends on them"
        value = "right" if is_right else "ignored"
        yield Finding("suffix read", "ok", value, f"ranges that count from the end {detail}")

    def checksum(self) -> Iterator[Finding]:
        if self._trials is None:
            return
        key = self._new("checksum")
        hint = "bytes that change on the way are found when the object is looked at, or read"
        try:
            is_taken = self._trials.put_damaged(key, _SMALL)
        except StoreBusy:
            raise
        except ReplicateError as error:
            detail = f"the server takes no checksum: {error.message}"
            yield Finding("checksum", "warn", "refused", detail, hint)
            return
        if is_taken:
            yield Finding(
                "checksum", "warn", "ignored", "the server takes bytes whose checksum is wrong", hint
            )
        else:
            yield Finding("checksum", "ok", "checked", "the server refuses bytes whose checksum is wrong")

    def overwriting(self) -> Iterator[Finding]:
        key = self._new("overwriting")
        stale = 0
        for number in range(_ROUNDS):
            data = b"%d" % number
            self._store.replace(key, data)
            stale += self._store.get(key) != data
        if stale:
            detail = f"{stale} of {_ROUNDS} times the old bytes came back"
            hint = "only heartbeats are overwritten: `ps` may show runs of other machines as they were before"
            yield Finding("overwrite", "warn", "lags", detail, hint)
        else:
            yield Finding("overwrite", "ok", "at once", "an object that is overwritten is read back at once")

    def clock(self) -> Iterator[Finding]:
        ahead_s = None if self._trials is None else self._trials.clock_ahead_s()
        if ahead_s is None:
            return
        off_s = abs(ahead_s)
        if off_s <= CLOCK_WARN_S:
            yield Finding(
                "clock", "ok", str(round(-ahead_s)), "the clocks of this machine and the server agree"
            )
            return
        words = "behind" if ahead_s > 0 else "ahead of"
        hint = "set the clock of this machine; servers refuse requests that are 15 minutes off, nothing else "
        yield Finding(
            "clock",
            "fail" if off_s >= CLOCK_FAIL_S else "warn",
            str(round(-ahead_s)),
            f"the clock of this machine is {off_s:.0f} s {words} the server's",
            hint + "depends on it but the times that are shown",
        )

    def large(self) -> Iterator[Finding]:
        key = self._new("large")
        data = os.urandom(LARGE_BYTES)
        began = time.perf_counter()
        self._store.put(key, [data], is_unique=True)
        put_s = time.perf_counter() - began
        began = time.perf_counter()
        is_same = self._store.get(key) == data
        get_s = time.perf_counter() - began
        if not is_same:
            yield _other_bytes("large object")
            return
        put_rate, get_rate = (LARGE_BYTES / max(took_s, 1e-6) / 1e6 for took_s in (put_s, get_s))
        detail = f"{LARGE_BYTES >> 20} MiB written at {put_rate:.0f} MB/s and read at {get_rate:.0f} MB/s"
        yield Finding("large object", "ok", f"{put_rate:.1f}", detail)

    def deletion(self) -> Iterator[Finding]:
        hint = "gc will not free space here, and `rm` cannot remove anything"
        several = [self._new(f"several/{number}") for number in range(4)]
        for key in several:
            self._store.put(key, [b"x"], is_unique=True, is_checked=False)
        left: dict[str, ReplicateError | None] = {}
        for name, keys in (("delete", self._made[:1]), ("batch delete", several)):
            try:
                self._store.delete(*keys)
            except StoreBusy:
                raise
            except ReplicateError as error:
                left[name] = error
                yield Finding(name, "warn", "refused", f"not done: {error.message}", hint)
                continue
            if any(self._store.exists(key) for key in keys):
                yield Finding(name, "warn", "ignored", "what was deleted is still there", hint)
            else:
                words = "an object" if name == "delete" else "several objects at once"
                yield Finding(name, "ok", "works", f"{words} could be deleted")

    def clean_up(self) -> None:
        """Delete what was put; what cannot be deleted, and that is told by then, stays."""
        with contextlib.suppress(ReplicateError):
            self._store.delete(*self._made)
        root = self._store.capabilities.local_root
        if root is None:
            return
        # The directories are not objects: nobody else would remove them.
        below = [path for path in (root / self._prefix).glob("*/") if path.is_dir()]
        empty = [*below, root / self._prefix, root / PREFIX]
        if not self._has_temporaries:
            empty.append(root / "tmp")
        for directory in empty:
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _new(self, name: str) -> str:
        key = self._prefix + name
        self._made.append(key)
        return key

    def _list(self, prefix: str) -> set[str]:
        return {found.key for found in self._store.list(prefix)}


def _other_bytes(name: str) -> Finding:
    return Finding(
        name, "fail", "wrong", "other bytes came back than were written", "nothing can be stored here safely"
    )
