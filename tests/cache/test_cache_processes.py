"""Several processes use one cache and die in the middle of it: it stays below its limit and tells no lies."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from blake3 import blake3

from replicated.cache import ContentCache

PROGRAM = Path(__file__).with_name("use_cache.py")
LIMIT_BYTES = 4 << 20


class User:
    """A process that uses the cache."""

    def __init__(self, directory, log, seed):
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, directory, str(LIMIT_BYTES), str(seed)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def wait_for(self, lines):
        """What the process did next; fails when it ended."""
        said = [self.process.stdout.readline().strip() for _ in range(lines)]
        assert all(said), "the process ended by itself"
        return said

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def start(directory, tmp_path):
    users = []
    with open(tmp_path / "log", "ab") as log:

        def start_one(seed):
            users.append(User(directory, log, seed))
            return users[-1]

        yield start_one
        for user in users:
            user.kill()


def test_processes_that_are_killed_leave_a_cache_that_is_right_and_small(
    start, directory, taken, tmp_path, contents
):
    source = random.Random(7)
    users = [start(seed) for seed in range(3)]
    said = Counter()
    for round_ in range(24):
        for user in users:
            said.update(user.wait_for(source.randrange(1, 20)))
        for user in users:
            user.stop()
        assert taken(directory) <= LIMIT_BYTES
        for user in users:
            user.go_on()
        if round_ % 2:
            victim = users.pop(source.randrange(len(users)))
            # In the middle of whatever it does now.
            victim.kill()
            users.append(start(100 + round_))
    for user in users:
        user.kill()
    assert said["opened"]
    assert any(line.startswith("recalled") and line != "recalled 0" for line in said)
    assert "Traceback" not in (tmp_path / "log").read_text()

    # What the dead have left takes nobody's room.
    chunks = contents(30, 50_000, seed=5)
    cache = ContentCache(directory, LIMIT_BYTES)
    try:
        cache.remember(chunks)
        assert cache.recall(list(chunks)) == chunks
        assert taken(directory) <= LIMIT_BYTES
    finally:
        cache.close()


def test_file_of_a_builder_that_was_killed_is_built_by_the_next(directory, taken):
    content = os.urandom(1 << 20)
    code = f"""
import os, signal, sys
from pathlib import Path
from blake3 import blake3
from replicated.cache import ContentCache
content = sys.stdin.buffer.read()
def parts():
    yield content[:500_000]
    yield content[500_000:-1]
    os.kill(os.getpid(), signal.SIGKILL)
    yield content[-1:]
cache = ContentCache(Path({str(directory)!r}), {LIMIT_BYTES})
cache.build_plain(blake3(content).digest(), len(content), parts())
"""
    cache = ContentCache(directory, LIMIT_BYTES)
    try:
        ended = subprocess.run([sys.executable, "-c", code], input=content, timeout=60)
        assert ended.returncode == -signal.SIGKILL
        digest = blake3(content).digest()
        assert not cache.has_plain(digest)
        assert cache.open_plain(digest, len(content)) is None
        assert cache.build_plain(digest, len(content), [content])
        with cache.open_plain(digest, len(content)) as plain:
            buffer = bytearray(len(content))
            assert plain.read_into(memoryview(buffer), 0) == len(content)
            assert buffer == content
        assert taken(directory) < 2 << 20
    finally:
        cache.close()


def test_process_goes_on_where_one_that_was_killed_has_left_off(directory, contents):
    code = f"""
import os, signal, sys
from pathlib import Path
from blake3 import blake3
from replicated.cache import ContentCache
data = sys.stdin.buffer.read()
chunks = [data[at:at + 10_000] for at in range(0, len(data), 10_000)]
cache = ContentCache(Path({str(directory)!r}), {LIMIT_BYTES})
cache.remember({{blake3(chunk).digest(): chunk for chunk in chunks}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    chunks = contents(64, 10_000)
    subprocess.run([sys.executable, "-c", code], input=b"".join(chunks.values()), timeout=60)
    cache = ContentCache(directory, LIMIT_BYTES)
    try:
        assert cache.recall(list(chunks)) == chunks
        files = {path.name for path in directory.glob("*/*")}
        more = contents(5, 10_000, seed=1)
        cache.remember(more)
        assert cache.recall(list(more)) == more
    finally:
        cache.close()
    assert len({path.name for path in directory.glob("*/*")} - files) <= 1
