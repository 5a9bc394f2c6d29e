"""Reading: whatever way, exactly the bytes that were saved."""

import errno
import fcntl
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading

import pytest

proves = pytest.mark.proves


@pytest.fixture
def file(shown):
    """The big file, open."""
    descriptor = os.open(shown.directory / "big", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@proves("S-30")
def test_reads_give_what_was_asked_for_and_less_only_at_the_end(file, big):
    assert os.pread(file, 100, len(big) - 7) == big[-7:]
    assert os.pread(file, 100, len(big)) == b""
    assert os.pread(file, 100, 10**12) == b""
    assert os.pread(file, 3_000_000, 1_234_567) == big[1_234_567:4_234_567]
    assert os.pread(file, 10**8, 0) == big


@proves("S-30")
def test_reads_anywhere_and_of_any_length_are_right(file, big):
    choice = random.Random(7)
    for _ in range(300):
        offset, length = choice.randrange(len(big) + 5000), choice.choice([1, 511, 4096, 70_000, 700_000])
        assert os.pread(file, length, offset) == big[offset : offset + length]


@proves("S-30")
def test_backwards_and_into_many_buffers(file, big):
    for offset in range(len(big) - 100_000, 0, -250_000):
        assert os.pread(file, 100_000, offset) == big[offset : offset + 100_000]
    buffers = [bytearray(3), bytearray(70_000), bytearray(1)]
    assert os.preadv(file, buffers, 999_999) == 70_004
    assert b"".join(buffers) == big[999_999:1_070_003]


@proves("S-32")
def test_seeking_works_and_the_whole_file_is_data(file, big, shown):
    assert os.lseek(file, -10, os.SEEK_END) == len(big) - 10
    assert os.read(file, 100) == big[-10:]
    assert os.lseek(file, 5, os.SEEK_SET) == 5
    assert os.lseek(file, 5, os.SEEK_CUR) == 10
    assert os.lseek(file, 0, os.SEEK_DATA) == 0
    assert os.lseek(file, 0, os.SEEK_HOLE) == len(big)
    with pytest.raises(OSError) as raised:
        os.lseek(file, len(big) + 1, os.SEEK_DATA)
    assert raised.value.errno == errno.ENXIO


@proves("S-30")
def test_zeros_are_zeros_and_nothing_is_nothing(shown):
    assert (shown.directory / "zeros").read_bytes() == bytes(3_000_000)
    assert (shown.directory / "empty").read_bytes() == b""


@proves("S-33")
def test_a_file_can_be_mapped_into_memory(shown, big, tmp_path):
    expected = tmp_path / "expected"
    expected.write_bytes(big)
    # In a process of its own: a mapping that cannot be read kills.
    code = """
import mmap, sys
expected = open(sys.argv[2], "rb").read()
for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
    with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ) as mapped:
        assert mapped[4_000_000:4_000_100] == expected[4_000_000:4_000_100]
        for offset in range(len(expected) - 10, 0, -300_007):
            assert mapped[offset : offset + 10] == expected[offset : offset + 10]
        assert mapped[:] == expected
"""
    done = subprocess.run([sys.executable, "-c", code, shown.directory / "big", expected])
    assert done.returncode == 0


@proves("S-33")
def test_a_mapping_ends_with_the_last_page_of_the_file(shown):
    code = """
import ctypes, mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, *[ctypes.c_size_t] * 5)
address = libc.mmap(None, 2 * 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)
# What follows the end in its page reads as zeros.
assert ctypes.string_at(address, 3) == b"1" + bytes(2)
print("so far", flush=True)
ctypes.string_at(address + 4096, 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, shown.directory / "with space"], stdout=subprocess.PIPE
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, b"so far\n")


@proves("S-33")
def test_a_mapping_cannot_be_written_through(file):
    with pytest.raises(PermissionError):
        mmap.mmap(file, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(file, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        # That is memory of ours.
        mapped[:3] = b"abc"
        assert os.pread(file, 3, 0) != b"abc"


@proves("S-34")
def test_direct_reads_are_right(shown, big):
    descriptor = os.open(shown.directory / "big", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    try:
        for offset in (0, 4096, 1 << 20, 3 * 4096 + (2 << 20), 4_999_168):
            count = os.preadv(descriptor, [buffer], offset)
            assert buffer[:count] == big[offset : offset + (1 << 20)]
    finally:
        os.close(descriptor)


@proves("S-35")
def test_many_readers_at_once_get_the_right_bytes(shown, big):
    wrong = []

    def read(seed):
        choice = random.Random(seed)
        for _ in range(40):
            offset, length = choice.randrange(len(big)), choice.randrange(1, 400_000)
            with open(shown.directory / "big", "rb", buffering=0) as file:
                if os.pread(file.fileno(), length, offset) != big[offset : offset + length]:
                    wrong.append((offset, length))
            name = b"%05d" % choice.randrange(3000)
            with open(os.path.join(os.fsencode(shown.directory), b"many", name), "rb") as file:
                if file.read() != b"%d" % int(name):
                    wrong.append(name)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@proves("S-36")
def test_the_kernel_can_send_a_file_on(shown, file, big, tmp_path):
    ours, theirs = socket.socketpair()
    received = bytearray()

    def receive():
        while data := theirs.recv(1 << 20):
            received.extend(data)

    thread = threading.Thread(target=receive)
    thread.start()
    offset = 0
    while sent := os.sendfile(ours.fileno(), file, offset, len(big)):
        offset += sent
    ours.close()
    thread.join()
    theirs.close()
    assert received == big
    copied = subprocess.run(["cp", "--", shown.directory / "big", tmp_path / "copy"])
    assert copied.returncode == 0
    assert (tmp_path / "copy").read_bytes() == big


@proves("S-37")
def test_files_can_be_locked_and_synced(shown):
    path = shown.directory / "with space"
    with open(path, "rb") as one, open(path, "rb") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.fsync(one.fileno())
    directory = os.open(shown.directory, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


@proves("S-38")
def test_what_is_open_can_be_read_without_its_path(shown, big):
    descriptor = os.open(shown.directory / "big", os.O_RDONLY)
    inherited = subprocess.run(["tail", "-c", "9"], stdin=descriptor, capture_output=True, check=True)
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    os.close(descriptor)
    assert os.pread(again, 9, 2_000_000) == big[2_000_000:2_000_009]
    os.close(again)
    assert inherited.stdout == big[-9:]
    path_only = os.open(shown.directory / "big", os.O_PATH)
    assert os.fstat(path_only).st_size == len(big)
    os.close(path_only)
