"""Whatever is done to a cache, in whatever order: right bytes or none, and never more than the limit."""

import os
import random
import shutil
import tempfile
from pathlib import Path

from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from replicated.cache import ContentCache

LIMIT_BYTES = 3 << 20
LIMITS = [LIMIT_BYTES, 2 << 20, 1 << 20]
SIZES = [1, 1000, 4096, 50_000, 200_000, 400_000]


def content(number):
    return random.Random(number).randbytes(SIZES[number % len(SIZES)])


CONTENTS = [content(number) for number in range(60)]
DIGESTS = [blake3(content).digest() for content in CONTENTS]
NUMBERS = st.integers(0, len(CONTENTS) - 1)
PLAIN = st.integers(0, 23)


def disk_bytes(directory):
    total = 0
    for parent, _, names in os.walk(directory):
        infos = [os.lstat(os.path.join(parent, name)) for name in names]
        total += 4096 + sum(info.st_blocks * 512 if info.st_blocks else info.st_size for info in infos)
    return total


class CacheMachine(RuleBasedStateMachine):
    """Two caches in one directory, as two processes have them."""

    def __init__(self):
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="cache"))
        self.directory = self.top / "content"
        self.limit_bytes = LIMIT_BYTES
        self.caches = []
        self.opened = []

    @initialize()
    def begin(self):
        self.caches = [ContentCache(self.directory, self.limit_bytes) for _ in range(2)]

    @rule(which=st.integers(0, 1), numbers=st.lists(NUMBERS, min_size=1, max_size=20))
    def remember(self, which, numbers):
        self.caches[which].remember({DIGESTS[number]: CONTENTS[number] for number in numbers})

    @rule(which=st.integers(0, 1), numbers=st.lists(NUMBERS, min_size=1, max_size=20))
    def recall(self, which, numbers):
        found = self.caches[which].recall([DIGESTS[number] for number in numbers])
        for digest, found_content in found.items():
            assert found_content == CONTENTS[DIGESTS.index(digest)]

    @rule(which=st.integers(0, 1), number=PLAIN, cut=st.integers(0, 1000))
    def build(self, which, number, cut):
        data = CONTENTS[number]
        self.caches[which].build_plain(DIGESTS[number], len(data), [data[:cut], data[cut:]])

    @rule(which=st.integers(0, 1), number=PLAIN, stays=st.booleans())
    def open(self, which, number, stays):
        plain = self.caches[which].open_plain(DIGESTS[number], len(CONTENTS[number]))
        if plain is not None:
            self.opened.append((plain, number))
            self.check_open(plain, number)
            if not stays:
                self.close_open()

    @rule()
    def close_open(self):
        if self.opened:
            plain, number = self.opened.pop()
            self.check_open(plain, number)
            plain.close()

    @rule(which=st.integers(0, 1))
    def reopen(self, which):
        self.caches[which].close()
        self.caches[which] = ContentCache(self.directory, self.limit_bytes)

    @rule(limit_bytes=st.sampled_from(LIMITS))
    def change_limit(self, limit_bytes):
        for cache in self.caches:
            cache.close()
        while self.opened:
            self.close_open()
        self.limit_bytes = limit_bytes
        self.begin()

    @rule(seed=st.integers(0, 1000), how=st.sampled_from(["cut", "flip", "delete", "zeros"]))
    def damage_a_file(self, seed, how):
        files = [path for path in sorted(self.directory.glob("*/*")) if path.is_file()]
        if not files:
            return
        source = random.Random(seed)
        path = source.choice(files)
        if any(os.path.samestat(os.fstat(plain.descriptor), path.stat()) for plain, _ in self.opened):
            return  # what becomes of those is another test
        data = bytearray(path.read_bytes())
        if how == "delete" or not data:
            path.unlink()
        elif how == "cut":
            os.truncate(path, len(data) // 2)
        else:
            start = source.randrange(len(data))
            data[start : start + 1] = bytes([data[start] ^ 0xFF])
            if how == "zeros":
                data = bytearray(len(data))
            with open(path, "r+b") as file:
                file.write(data)

    @rule(how=st.sampled_from(["all", "files"]))
    def delete(self, how):
        for path in [self.directory] if how == "all" else list(self.directory.glob("*")):
            if path.is_dir():
                shutil.rmtree(path)

    @invariant()
    def is_within_the_limit(self):
        assert disk_bytes(self.directory) <= self.limit_bytes

    def check_open(self, plain, number):
        data = bytearray(plain.size)
        assert plain.read_into(memoryview(data), 0) == len(data)
        assert plain.is_intact()
        assert data == CONTENTS[number]

    def teardown(self):
        for cache in self.caches:
            cache.close()
        while self.opened:
            self.close_open()
        shutil.rmtree(self.top)


TestCacheStates = CacheMachine.TestCase
TestCacheStates.settings = settings(
    max_examples=settings.default.max_examples // 2, stateful_step_count=40, deadline=None
)
