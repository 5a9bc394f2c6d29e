"""Serves one mount for a test, by the engine that it asks for: a program of its own, as mounts are.

    python serve_engine.py '{"repository": …, "snapshots": […], "directory": …, …}'

It writes one line of JSON when the mount can be used. With `plain`, big files lie in the cache as a whole
before that. With `control`, the name of a file, the store is far away and does what that file says, which
is looked at in each request:

    ok | fail | hang | flip | cut | lose       (what happens to each read of a pack)

Whatever is asked of a pack is first written to `log`, a line each.
"""

import dataclasses
import json
import logging
import os
import sys
import threading
from pathlib import Path

from replicate.errors import ReplicateError, RepositoryUnreachable
from replicate.ids import SnapshotId
from replicated import repository
from replicated.cache import DEFAULT_CACHE_BYTES, ContentCache
from replicated.keys import PACK_PREFIX
from replicated.mount.building import MountedFiles
from replicated.mount.engine.choosing import choose
from replicated.mount.options import MountOptions
from replicated.repository import Repository
from replicated.store import open_store
from replicated.store.base import KeyMissing
from replicated.tree import open_tree

#: Of a file that may lie in the cache as a whole.
MIN_PLAIN_BYTES = 1 << 20
#: How often a request that hangs looks whether it still shall.
POLL_S = 0.02


class FaultyStore:
    """A store that is far away, and of which a file says what is wrong with it."""

    def __init__(self, store, control, log):
        self._store = store
        self._control = Path(control)
        self._log = open(log, "a", buffering=1)  # noqa: SIM115  for as long as the process lives

    def __getattr__(self, name):
        return getattr(self._store, name)

    @property
    def capabilities(self):
        return dataclasses.replace(self._store.capabilities, local_root=None, is_near=False)

    def get(self, key, offset=0, length=None):
        if not key.startswith(PACK_PREFIX):
            return self._store.get(key, offset, length)
        mode = self._control.read_text()
        self._log.write(f"{mode} {key} {offset} {length}\n")
        if mode == "hang":
            waiting = threading.Event()
            while self._control.read_text() == "hang":
                waiting.wait(POLL_S)
        elif mode == "fail":
            raise RepositoryUnreachable("the store is away")
        elif mode == "lose":
            raise KeyMissing(key)
        data = self._store.get(key, offset, length)
        if mode == "cut":
            return data[: len(data) // 2]
        if mode == "flip":
            # Every bit of every byte: whichever part is used, it is wrong.
            return bytes(byte ^ 0xFF for byte in data)
        return data


def make_plain(url, snapshot_ids, cache):
    """Put all big files into the cache as a whole, as they are once they have been read."""
    content = ContentCache(cache / "content", DEFAULT_CACHE_BYTES)
    opened = Repository.open(url, cache=cache, create=False)
    tree = open_tree(opened, *snapshot_ids)
    for _, node in tree.walk():
        if node.type == "file" and node.size >= MIN_PLAIN_BYTES:
            assert content.build_plain(node.hash, node.size, tree.reader(node).iter_parts(0, node.size))
    opened.close()
    content.close()


def main(argument):
    asked = json.loads(argument)
    logging.basicConfig(level=logging.WARNING)
    url = f"file://{asked['repository']}"
    options = MountOptions(**asked["options"])
    cache = Path(asked["cache"])
    snapshot_ids = [SnapshotId(name) for name in asked["snapshots"]]
    directory = os.fsencode(asked["directory"])
    if asked["plain"]:
        make_plain(url, snapshot_ids, cache)
    if asked["control"]:
        # Where a repository gets its store from: there is no URL for one that fails.
        repository.open_store = lambda url, *, create: FaultyStore(
            open_store(url, create=create), asked["control"], asked["log"]
        )

    def say_ready(report):
        # The mount answers this only when the kernel takes requests.
        os.statvfs(directory)
        files.begin(report)
        print(json.dumps(dataclasses.asdict(report)), flush=True)

    try:
        with MountedFiles(url, snapshot_ids, cache=cache, directory=directory, options=options) as files:
            choose(options).serve(
                files.filesystem,
                directory,
                source_name="replicate:test",
                options=options,
                on_mounted=say_ready,
            )
    except ReplicateError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
