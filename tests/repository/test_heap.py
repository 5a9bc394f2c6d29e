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
