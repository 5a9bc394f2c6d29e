"""The index of chunks as it grows to ten million: what taking in and looking up costs, cold and warm.

    python benchmarks/index_scale.py [--chunks N] [--per-object N] [--deltas SHARE] [--directory DIR]

An index object after the other is written to a local store and taken in, as after an upload. Prints a row
ten times on the way: look-ups are by batches of 500 ids, as readers make them; cold means that neither
SQLite nor the kernel has any page of the file. In the end the index is made anew from all index objects, and
refreshed when there is nothing new; the same with very many index objects. Microseconds are of one chunk, by
the clock and, in brackets, of the processor.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from blake3 import blake3
from measuring.machine import describe_machine

from replicated.format.listing import build_index
from replicated.format.pack import DATA_PACK, MAX_PACK_CHUNKS, PackListing, Record
from replicated.index import Index
from replicated.keys import INDEX_PREFIX
from replicated.store import open_store
from replicated.store.base import Store

#: Chunks that are looked up for one figure, and in one call.
LOOKED_UP = 10_000
BATCH = 500
#: Of which a pack of 32 MiB is full: 1 MiB that became 0.85.
CHUNKS_PER_PACK = 38
#: That are uploaded before an index object is written.
TENSORS_PER_OBJECT = 250
PLAIN_BYTES = 1 << 20
STORED_BYTES = 890_000

HEADER = (
    "   chunks   add us (cpu)  written B   hit us (cpu)  miss us (cpu)  cold hit cold miss   file MB  B/chunk"
    "   peak MiB"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000_000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--per-object",
        type=int,
        default=1 << 17,
        metavar="N",
        help="chunks in an index object: at most 131072 small ones, 250 pieces of tensors (%(default)s)",
    )
    parser.add_argument(
        "--deltas",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="how many of later ones have a base (default: 0)",
    )
    parser.add_argument(
        "--objects", type=int, default=100_000, metavar="N", help="small index objects (default: %(default)s)"
    )
    parser.add_argument("--directory", help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replicate-index-", dir=options.directory) as directory:
        print(", ".join(f"{name}: {value}" for name, value in describe_machine(Path(directory)).items()))
        store = open_store(f"file://{directory}/store", create=True)
        caches = Path(directory) / "caches"
        grow(store, caches, options.chunks, options.per_object, options.deltas)
        make_anew(store, Path(directory) / "other caches", options.chunks)
    with tempfile.TemporaryDirectory(prefix="replicate-index-", dir=options.directory) as directory:
        store = open_store(f"file://{directory}/store", create=True)
        print(f"{options.objects} index objects of one chunk each:")
        (Path(directory) / "store" / "index").mkdir()
        for number in range(options.objects):
            # Not through the store, which makes each durable.
            path = Path(directory) / "store" / "index" / chunk_id(-1 - number).hex()
            path.write_bytes(build_index(make_listings(number, 1, 0)))
        make_anew(store, Path(directory) / "caches", options.objects)


def grow(store: Store, caches: Path, chunk_count: int, per_object: int, deltas: float) -> None:
    index = Index(caches, "ab" * 32, store)
    print(HEADER)
    done = 0
    for row in range(1, 11):
        clock = Clock()
        before = done
        while done < chunk_count * row // 10:
            count = min(per_object, chunk_count * row // 10 - done)
            listings = make_listings(done, count, deltas)
            name = chunk_id(-1 - done).hex()
            store.put(INDEX_PREFIX + name, [build_index(listings)])
            with clock:
                index.add(name, listings)
            done += count
        print(f"{done:9} {clock.per(done - before)} {clock.written / (done - before):10.0f} ", end="")
        hits = [chunk_id(number) for number in random.Random(row).choices(range(done), k=LOOKED_UP)]
        misses = [os.urandom(32) for _ in range(LOOKED_UP)]
        warm = [look_up(index.locate, hits), look_up(index.find_missing, misses)]
        index.close()
        cold = []
        for ids in (hits, misses):
            drop_caches(caches)
            with closing(Index(caches, "ab" * 32, store)) as fresh:
                cold.append(look_up(fresh.locate, ids).elapsed / LOOKED_UP * 1e6)
        index = Index(caches, "ab" * 32, store)
        size = database(caches).stat().st_size
        print(
            f"{warm[0].per(LOOKED_UP)} {warm[1].per(LOOKED_UP)} {cold[0]:9.1f} {cold[1]:10.1f} "
            f"{size / 1e6:9.0f} {size / done:8.1f} {peak_mib():10.0f}",
            flush=True,
        )
    clock = Clock()
    for first in range(done, done + LOOKED_UP, TENSORS_PER_OBJECT):
        listings = make_listings(first, TENSORS_PER_OBJECT, deltas)
        with clock:
            index.add(chunk_id(-1 - first).hex(), listings)
    written = clock.written / LOOKED_UP
    print(f"then objects of {TENSORS_PER_OBJECT}: {clock.per(LOOKED_UP).strip()} us, {written:.0f} B written")
    index.close()


def make_anew(store: Store, caches: Path, chunk_count: int) -> None:
    with closing(Index(caches, "ab" * 32, store)) as index:
        for what in ("all index objects read anew", "refreshed with nothing new"):
            clock = Clock()
            with clock:
                index.refresh()
            print(
                f"{what}: {clock.elapsed:.2f} s, processor {clock.cpu:.2f} s, "
                f"{clock.written / chunk_count:.0f} B written a chunk, peak {peak_mib():.0f} MiB"
            )
    size = database(caches).stat().st_size
    print(f"file after reading anew: {size / 1e6:.0f} MB, {size / chunk_count:.1f} B/chunk")


class Clock:
    """Sums up what runs within it."""

    def __init__(self) -> None:
        self.elapsed = self.cpu = 0.0
        self.written = 0

    def __enter__(self) -> None:
        self._begun = time.perf_counter(), time.process_time(), written_bytes()

    def __exit__(self, *_: object) -> None:
        elapsed, cpu, written = self._begun
        self.elapsed += time.perf_counter() - elapsed
        self.cpu += time.process_time() - cpu
        self.written += written_bytes() - written

    def per(self, count: int) -> str:
        """Microseconds by the clock, and of the processor."""
        return f"{self.elapsed / count * 1e6:8.1f} ({self.cpu / count * 1e6:4.1f})"


def look_up(action: Callable[[list[bytes]], object], ids: list[bytes]) -> Clock:
    clock = Clock()
    with clock:
        for start in range(0, len(ids), BATCH):
            action(ids[start : start + BATCH])
    return clock


def make_listings(first: int, count: int, deltas: float) -> list[PackListing]:
    """Packs with the chunks of these numbers: of ten checkpoints the first has the bases of the others."""
    per_pack = min(MAX_PACK_CHUNKS, max(CHUNKS_PER_PACK, count // 8))
    return [
        PackListing(
            chunk_id(number)[::-1],
            DATA_PACK,
            1 << 31,
            tuple(make_records(number, min(per_pack, first + count - number), deltas)),
        )
        for number in range(first, first + count, per_pack)
    ]


def make_records(first: int, count: int, deltas: float) -> Iterator[Record]:
    for number in range(first, first + count):
        is_delta = number % 10_000 >= 1000 and number % 1000 < deltas * 1000
        base = chunk_id(number - number % 10_000 + number % 1000) if is_delta else b""
        offset = 64 + (number - first) * 30_000
        stored_bytes = STORED_BYTES + number % 1009
        yield Record(chunk_id(number), offset, stored_bytes, PLAIN_BYTES, 3 if is_delta else 2, base)


def chunk_id(number: int) -> bytes:
    return blake3(number.to_bytes(8, "little", signed=True)).digest()


def database(caches: Path) -> Path:
    (path,) = caches.glob("*.db")
    return path


def drop_caches(caches: Path) -> None:
    """Let the kernel forget the file, which is closed."""
    for path in caches.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def written_bytes() -> int:
    """What this process has handed to the kernel so far."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split("\n")[0])


def peak_mib() -> float:
    """The most memory that was resident since the last call."""
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")
    return peak / 1024


if __name__ == "__main__":
    main()
