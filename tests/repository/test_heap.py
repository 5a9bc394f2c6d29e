"""Memory for chunks is kept between them."""

import platform
import subprocess
import sys

import pytest

#: Decodes chunks and counts the pages that had to be made.
PROGRAM = """
import resource
from replicated.heap import keep_memory
if {is_kept}:
    keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
chunks = [bytes(bytearray(1 << 20)) for _ in range(8)]
before = faults()
for _ in range(50):
    chunks = None
    chunks = [bytearray(1 << 20) for _ in range(8)]
print(faults() - before)
"""


def count_faults(*, is_kept: bool) -> int:
    program = PROGRAM.format(is_kept=is_kept)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_made_once() -> None:
    assert count_faults(is_kept=True) < count_faults(is_kept=False) / 4


#: Takes memory in several threads at once, and lists the heaps that there are then.
THREADS = """
import ctypes, threading
from replicated.heap import keep_memory
if {is_kept}:
    keep_memory()
barrier = threading.Barrier(4)
def take():
    barrier.wait()
    chunks = [bytearray(1 << 16) for _ in range(64)]
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
c = ctypes.CDLL(None)
c.fdopen.restype = ctypes.c_void_p
output = ctypes.c_void_p(c.fdopen(1, b"w"))
c.malloc_info(0, output)
c.fflush(output)
"""


def count_heaps(*, is_kept: bool) -> int:
    program = THREADS.format(is_kept=is_kept)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return result.stdout.count(b"<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_threads_share_one_heap() -> None:
    assert count_heaps(is_kept=True) == 1
    assert count_heaps(is_kept=False) > 1


#: Makes many objects that refer to nothing in a circle, and counts how often a circle was looked for.
CYCLES = """
import gc
from replicated.heap import collect_rarely
if {is_rare}:
    collect_rarely()
before = gc.get_stats()[0]["collections"]
entries = [(number, (number,)) for number in range(30_000)]
print(gc.get_stats()[0]["collections"] - before)
"""


def count_collections(*, is_rare: bool) -> int:
    program = CYCLES.format(is_rare=is_rare)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def test_cycles_are_looked_for_rarely() -> None:
    assert count_collections(is_rare=True) == 0 < count_collections(is_rare=False)
