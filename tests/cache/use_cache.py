"""A process that uses a cache at random until it is killed, and says a line for everything that it did.

`use_cache.py DIRECTORY LIMIT_BYTES SEED`. It ends with an error when it gets bytes that nobody kept.
"""

import random
import sys
from pathlib import Path

from blake3 import blake3

from replicated.cache import ContentCache

SIZES = [100, 5000, 70_000, 300_000]
COUNT = 80


def content(number):
    return random.Random(number).randbytes(SIZES[number % len(SIZES)])


def main(directory, limit_bytes, seed):
    source = random.Random(seed)
    contents = {blake3(content(number)).digest(): content(number) for number in range(COUNT)}
    cache = ContentCache(Path(directory), int(limit_bytes))
    while True:
        chosen = dict(source.sample(sorted(contents.items()), source.randrange(1, 12)))
        done = source.choice(["remember", "recall", "build", "open"])
        if done == "remember":
            cache.remember(chosen)
        elif done == "recall":
            found = cache.recall(list(chosen))
            assert all(chosen[digest] == data for digest, data in found.items()), "others than were kept"
            done = f"recalled {len(found)}"
        else:
            for digest, data in chosen.items():
                if done == "build":
                    cache.build_plain(digest, len(data), [data[:1000], data[1000:]])
                elif plain := cache.open_plain(digest, len(data)):
                    with plain:
                        buffer = bytearray(len(data))
                        plain.read_into(memoryview(buffer), 0)
                        assert buffer == data and plain.is_intact(), "another file than was made"
                    done = "opened"
        print(done, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
