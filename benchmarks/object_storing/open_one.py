"""Opens one file of a snapshot in a repository that this machine has never seen, and reads it.

    python open_one.py URL EXPERIMENT PATH

In a process of its own, without a daemon; prints the seconds from the first request to the last byte.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from replicate.ids import SnapshotId
from replicated.repository import Repository
from replicated.tree import open_tree


def main() -> None:
    url, experiment, path = sys.argv[1:]
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        repository = Repository.open(url, cache=Path(cache), create=False)
        tree = open_tree(repository, SnapshotId(experiment))
        node = tree.find(os.fsencode(path))
        content = tree.reader(node).pread(0, node.size)
        print(time.perf_counter() - begin)
        assert len(content) == node.size, "all of it has come"
        repository.close()


if __name__ == "__main__":
    main()
