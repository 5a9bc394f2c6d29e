#!/usr/bin/env python3
"""How fast chunks of each kind are encoded and decoded by one core, and what is left of them.

    python benchmarks/codecs.py

Chunks of 1 MiB that lie in the caches; the best of many runs, hashing not included but shown. Weights are
normally distributed, a difference is that to the same weights after some steps of training.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np

from replicated.chunk.codec import decode, encode, encode_delta, hash_chunk

CHUNK_BYTES = 1 << 20
BASE_ID = bytes(32)
CODECS = ("raw", "zstd", "planes", "delta")


def weights(seed=1, spread=0.02, item_bytes=4):
    count = CHUNK_BYTES // item_bytes
    return np.random.default_rng(seed).normal(0, spread, count).astype("<f8" if item_bytes == 8 else "<f4")


def as_bf16(numbers):
    return (numbers.view("<u4") >> 16).astype("<u2")


def text():
    """Python's own sources."""
    parts = [path.read_bytes() for path in sorted(Path(random.__file__).parent.glob("*.py"))]
    return b"".join(parts)[:CHUNK_BYTES]


def cases():
    """Name, plain bytes, size of the numbers as `encode` is told, and the base or None."""
    fp32, wide = weights(), weights(item_bytes=2)
    moved, wide_moved = fp32 + weights(2, 2e-4), wide + weights(2, 2e-5, item_bytes=2)
    tokens = np.minimum(np.random.default_rng(1).zipf(1.3, CHUNK_BYTES // 8), 50_000).astype("<i8")
    yield "fp32", fp32, 4, None
    yield "fp32, width not known", fp32, 0, None
    yield "fp32, in no tensor", fp32, None, None
    yield "bf16", as_bf16(wide), 2, None
    yield "float64", weights(item_bytes=8), 8, None
    yield "int64 tokens", tokens, 8, None
    yield "fp32, difference", moved, 4, fp32
    yield "bf16, difference", as_bf16(wide_moved), 2, as_bf16(wide)
    yield "text", np.frombuffer(text(), "u1"), None, None
    yield "zeros", np.zeros(CHUNK_BYTES, "u1"), None, None
    yield "random", np.frombuffer(random.Random(1).randbytes(CHUNK_BYTES), "u1"), None, None


def best_rate(action):
    """GB/s of the plain bytes."""
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return CHUNK_BYTES / best / 1e9


def main():
    print(f"{'data':<24}{'codec':<8}{'left':>8}{'encode':>12}{'decode':>12}")
    for name, numbers, item_bytes, before in cases():
        plain, base = numbers.tobytes(), None if before is None else before.tobytes()

        def run(plain=plain, item_bytes=item_bytes, base=base):
            if base is None:
                return encode(plain, item_bytes)
            return encode_delta(plain, BASE_ID, base, item_bytes)

        encoded = run()
        if encoded is None:
            sys.exit(f"the difference of {name} gains nothing")
        stored = memoryview(bytes(encoded.stored))

        def undo(codec=encoded.codec, stored=stored, base=base):
            return decode(codec, stored, CHUNK_BYTES, base)

        if undo() != plain:
            sys.exit(f"{name} came back as something else")
        left = len(stored) / len(plain)
        rates = f"{best_rate(run):>7.2f} GB/s{best_rate(undo):>7.2f} GB/s"
        print(f"{name:<24}{CODECS[encoded.codec]:<8}{left:>8.1%}{rates}")
    print(f"hashing: {best_rate(lambda: hash_chunk(plain)):.2f} GB/s")


if __name__ == "__main__":
    main()
