"""A training loop as a program: a fixed number of iterations of pure computation, each of them timed.

    python loop.py ITERATIONS RESULT

Says that it is ready and begins when its stdin is closed. Writes a JSON list of [begin, seconds].
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path


def iterate(batch: bytearray) -> None:
    """About 10 ms, half of it in the interpreter, half in C over a buffer that fills a cache."""
    for _ in range(6):
        hashlib.sha256(batch).digest()
    total = 0
    for number in range(60_000):
        total += number * number % 7


def main() -> None:
    batch = bytearray(os.urandom(1 << 20))
    for _ in range(20):
        iterate(batch)
    print("ready", flush=True)
    sys.stdin.read()
    times = []
    for _ in range(int(sys.argv[1])):
        begin = time.monotonic()
        iterate(batch)
        times.append((begin, time.monotonic() - begin))
    Path(sys.argv[2]).write_text(json.dumps(times))


if __name__ == "__main__":
    main()
