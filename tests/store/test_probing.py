"""What the trial of a store finds on good stores and on bad ones, and that it leaves nothing behind."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from servers import gs_servers, s3_servers
from servers.s3_servers import Server

from replicate.errors import RepositoryUnreachable
from replicated.store import open_store
from replicated.store.base import Buffer, KeyMissing, ObjectInfo, Store, StoreBusy
from replicated.store.limited import LimitedStore, UploadLimit
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore
from replicated.store.probing import Finding, probe_store
from replicated.store.retrying import RetryingStore


class Memory(MemoryStore):
    """A memory that has trials too, and is as good as can be; those below are worse in one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s: float | None = 0.0

    @property
    def trials(self) -> "Memory":
        return self

    def put_new(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        self.put(key, [data])
        return True

    def put_damaged(self, key: str, data: bytes) -> bool:
        return False

    def get_tail(self, key: str, length: int) -> bytes:
        return self.get(key)[-length:]

    def clock_ahead_s(self) -> float | None:
        return self.ahead_s


def found(store: Store) -> dict[str, Finding]:
    findings = list(probe_store(store))
    by_name = {finding.name: finding for finding in findings}
    assert len(by_name) == len(findings)
    return by_name


def keys(store: Store) -> list[str]:
    return [info.key for info in store.list("")]


ALL = {
    "reachable", "write", "conditional write", "listing", "ranged read", "suffix read", "checksum",
    "overwrite", "clock", "large object", "delete", "batch delete",
}  # fmt: skip


def test_good_store_has_nothing_but_good_findings() -> None:
    store = Memory()
    store.put("packs/a", [b"x"])
    findings = found(store)
    assert set(findings) == ALL
    assert {finding.outcome for finding in findings.values()} == {"ok"}
    assert keys(store) == ["packs/a"]


def test_trials_are_found_below_stores_that_pass_on() -> None:
    store = LimitedStore(RetryingStore(Memory()), UploadLimit(1 << 40))
    assert set(found(store)) == ALL


def test_disk_is_left_as_it_was(tmp_path: Path) -> None:
    findings = found(LocalStore(tmp_path))
    assert set(findings) == ALL - {"suffix read", "checksum", "clock"}
    assert {finding.outcome for finding in findings.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tmp").mkdir()
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "of-others").write_bytes(b"")
    found(LocalStore(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["of-others", "probe", "tmp"]


def test_quick_trial_moves_nothing_large() -> None:
    sizes: list[int] = []

    class Watched(Memory):
        def put(
            self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
        ) -> None:
            sizes.append(sum(len(part) for part in parts))
            super().put(key, parts)

    assert {finding.name for finding in probe_store(Watched(), is_thorough=False)} == ALL - {"large object"}
    assert max(sizes) <= 4096


# Each of these is bad in one thing


class IgnoresConditions(Memory):
    def put_new(self, key: str, data: bytes) -> bool:
        self.replace(key, data)
        return True


class RefusesConditions(Memory):
    def put_new(self, key: str, data: bytes) -> bool:
        raise RepositoryUnreachable("status 501: not implemented")


class SaysNoAndDoesIt(Memory):
    """What it says of a condition is right, and it overwrites all the same."""

    def put_new(self, key: str, data: bytes) -> bool:
        is_new = not self.exists(key)
        self.replace(key, data)
        return is_new


class ListsLate(Memory):
    """A listing shows what was there at the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, list[ObjectInfo]] = {}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        before = self._before.get(prefix, [])
        self._before[prefix] = list(super().list(prefix))
        yield from before


class ListsDeleted(Memory):
    def __init__(self) -> None:
        super().__init__()
        self._deleted: list[str] = []

    def delete(self, *keys: str) -> None:
        self._deleted += keys
        super().delete(*keys)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from super().list(prefix)
        yield from (ObjectInfo(key, 0) for key in self._deleted)


class IgnoresRanges(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return super().get(key)


class WrapsAtTheEnd(Memory):
    """Right, but beyond the end, where it begins anew."""

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        size = len(super().get(key))
        return super().get(key, offset % size if offset > size else offset, length)


class NoSuffixes(Memory):
    def get_tail(self, key: str, length: int) -> bytes:
        return self.get(key)


class TakesAnything(Memory):
    def put_damaged(self, key: str, data: bytes) -> bool:
        return True


class TakesNoChecksum(Memory):
    def put_damaged(self, key: str, data: bytes) -> bool:
        raise RepositoryUnreachable("no such header")


class OverwritesLate(Memory):
    def __init__(self) -> None:
        super().__init__()
        self._old: dict[str, bytes] = {}

    def replace(self, key: str, data: bytes) -> None:
        if self.exists(key):
            self._old[key] = self.get(key)
        super().replace(key, data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._old.pop(key) if key in self._old else super().get(key, offset, length)


class RefusesDeletes(Memory):
    def delete(self, *keys: str) -> None:
        raise RepositoryUnreachable("AccessDenied: it is locked")


class IgnoresDeletes(Memory):
    def delete(self, *keys: str) -> None:
        pass


class RefusesBatches(Memory):
    def delete(self, *keys: str) -> None:
        if len(keys) == 4:
            raise RepositoryUnreachable("no batches")
        super().delete(*keys)


class Lies(Memory):
    """Says that it has what it has not."""

    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        pass


class Flips(Memory):
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        return data if len(data) < 1 << 20 else b"?" + data[1:]


class ReadOnly(Memory):
    def put(
        self, key: str, parts: Sequence[Buffer], *, is_unique: bool = False, is_checked: bool = True
    ) -> None:
        raise RepositoryUnreachable("not allowed", hint="ask for the role")


def behind(seconds: float) -> Callable[[], Memory]:
    def make() -> Memory:
        store = Memory()
        store.ahead_s = seconds
        return store

    return make


@pytest.mark.parametrize(
    ("make", "name", "outcome", "value", "words"),
    [
        (IgnoresConditions, "conditional write", "ok", "ignored", "nothing depends on"),
        (RefusesConditions, "conditional write", "ok", "refused", "nothing depends on"),
        (SaysNoAndDoesIt, "conditional write", "fail", "wrong", "nothing can be stored"),
        (ListsLate, "listing", "warn", "lags", "gc must stay off"),
        (ListsDeleted, "listing", "warn", "lags", "gc must stay off"),
        (IgnoresRanges, "ranged read", "fail", "wrong", "cannot work here"),
        (WrapsAtTheEnd, "ranged read", "fail", "wrong", "beyond the end"),
        (NoSuffixes, "suffix read", "ok", "ignored", "nothing depends on"),
        (TakesAnything, "checksum", "warn", "ignored", "found when"),
        (TakesNoChecksum, "checksum", "warn", "refused", "no such header"),
        (OverwritesLate, "overwrite", "warn", "lags", "heartbeats"),
        (RefusesDeletes, "delete", "warn", "refused", "gc will not free space"),
        (RefusesDeletes, "batch delete", "warn", "refused", "it is locked"),
        (IgnoresDeletes, "delete", "warn", "ignored", "gc will not free space"),
        (RefusesBatches, "batch delete", "warn", "refused", "no batches"),
        (Lies, "write", "fail", "lost", "nothing can be stored"),
        (Flips, "large object", "fail", "wrong", "other bytes"),
        (ReadOnly, "write", "fail", "error", "ask for the role"),
        (behind(100), "clock", "warn", "-100", "100 s behind the server's"),
        (behind(-7200), "clock", "fail", "7200", "7200 s ahead of the server's"),
    ],
)
def test_bad_server_is_found_out_with_what_follows(
    make: Callable[[], Memory], name: str, outcome: str, value: str, words: str
) -> None:
    findings = found(make())
    finding = findings[name]
    assert (finding.outcome, finding.value) == (outcome, value)
    assert words in f"{finding.detail}; {finding.hint}"


@pytest.mark.parametrize(
    "make", [IgnoresConditions, ListsLate, TakesAnything, RefusesBatches, OverwritesLate]
)
def test_bad_server_is_bad_in_one_thing_only_and_is_cleaned_up(make: Callable[[], Memory]) -> None:
    store = make()
    findings = found(store)
    assert set(findings) == ALL
    assert sum(f.outcome != "ok" or f.value == "ignored" for f in findings.values()) == 1
    assert list(MemoryStore.list(store, "")) == []


def test_store_that_cannot_be_written_to_is_left_alone() -> None:
    assert set(found(ReadOnly())) == {"reachable", "write"}


def test_server_that_fails_in_the_middle_does_not_end_the_trial() -> None:
    class Hiccup(Memory):
        def get_tail(self, key: str, length: int) -> bytes:
            raise StoreBusy("it is busy")

        def replace(self, key: str, data: bytes) -> None:
            raise KeyMissing(key)

    findings = found(Hiccup())
    assert findings["overwrite"].outcome == findings["suffix read"].outcome == "fail"
    assert findings["ranged read"].outcome == "ok"
    assert findings["batch delete"].outcome == "ok"


# Real servers


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buckets")


@pytest.fixture(scope="session", params=["moto", "rclone", "emulator", "service"])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[str, Server]]:
    makers = {
        "moto": s3_servers.moto,
        "rclone": lambda: s3_servers.rclone(directory),
        "emulator": gs_servers.emulator,
        "service": gs_servers.service,
    }
    with makers[request.param]() as server:
        yield request.param, server


def environment(name: str, server: Server) -> dict[str, str]:
    if name in ("emulator", "service"):
        return gs_servers.environment(server.url)
    return {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}


KNOWN = {
    "moto": {"conditional write": "honoured", "suffix read": "right"},
    "rclone": {"conditional write": "ignored", "suffix read": "right"},
    "emulator": {"conditional write": "ignored", "suffix read": "ignored", "checksum": "checked"},
    "service": {"conditional write": "honoured", "suffix read": "right", "checksum": "checked"},
}


def test_servers_that_we_know_are_found_to_be_as_they_are(server: tuple[str, Server]) -> None:
    name, process = server
    scheme = "gs" if name in ("emulator", "service") else "s3"
    url = f"{scheme}://bucket-probed/team"
    variables = environment(name, process)
    (missing,) = probe_store(open_store(url, create=False, environment=variables))
    assert (missing.name, missing.outcome, missing.value) == ("reachable", "warn", "missing")
    (still_missing,) = probe_store(open_store(url, create=False, environment=variables))
    assert still_missing == missing
    store = open_store(url, create=True, environment=variables)
    store.put("a", [b""])
    findings = found(open_store(url, create=False, environment=variables))
    assert set(findings) == ALL
    assert not [finding for finding in findings.values() if finding.outcome == "fail"]
    assert {check: findings[check].value for check in KNOWN[name]} == KNOWN[name]
    assert findings["listing"].value == "at once"
    assert abs(int(findings["clock"].value)) <= 2
    assert keys(store) == ["a"]
