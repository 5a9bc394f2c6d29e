"""A mount process whose store behaves as if it were far away: every request takes a while and is counted.

    python serve_far.py COUNTS STATE REPOSITORY EXPERIMENT DIRECTORY

It is the program that serves every mount, on another store: the objects are local files, but it does not say
so. Its cache, register and log are in the directory STATE; the numbers of requests and of bytes so far are
kept in the file COUNTS, which is there already.
"""

import mmap
import os
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from replicated import repository
from replicated.mount import process
from replicated.mount.life.registry import MountOrder, Registration
from replicated.store import open_store
from replicated.store.base import Buffer, Capabilities, ObjectInfo, Store

sys.path.insert(0, str(Path(__file__).parents[1]))
from mounting import latency  # a script finds only what lies beside it

# ruff: noqa: D102  (`Store` describes the methods)

COUNTS = struct.Struct("<QQ")


class FarStore:
    """Another store, far away."""

    def __init__(self, store: Store, counts: mmap.mmap) -> None:
        self._store = store
        self._counts = counts
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    def put(self, key: str, parts: Sequence[Buffer], **how: bool) -> None:
        self._store.put(key, parts, **how)
        self._request()

    def replace(self, key: str, data: bytes) -> None:
        self._store.replace(key, data)
        self._request()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        content = self._store.get(key, offset, length)
        self._request(len(content))
        return content

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._request()
        return self._store.list(prefix)

    def delete(self, *keys: str) -> None:
        self._store.delete(*keys)
        self._request()

    def exists(self, key: str) -> bool:
        self._request()
        return self._store.exists(key)

    def _request(self, size_bytes: int = 0) -> None:
        with self._lock:
            requests, received = COUNTS.unpack_from(self._counts)
            COUNTS.pack_into(self._counts, 0, requests + 1, received + size_bytes)
        latency.wait_for(size_bytes)


def main() -> int:
    counts_file, state, url, experiment_id, directory = sys.argv[1:]
    with open(counts_file, "r+b") as file:
        counts = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)
    repository.open_store = lambda url, *, create: FarStore(open_store(url, create=create), counts)
    order = MountOrder(
        name="far",
        repository=url,
        experiment_id=experiment_id,
        checkpoint_id="",
        snapshot_ids=(experiment_id,),
        directory=directory,
    )
    start = process.Start(
        register=f"{state}/register",
        cache=f"{state}/cache",
        log=f"{state}/log",
        registration=Registration(order),
    )
    return process.main([start.encode()])


if __name__ == "__main__":
    sys.exit(main())
