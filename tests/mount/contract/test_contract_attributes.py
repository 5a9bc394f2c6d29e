"""What `stat`, `access` and extended attributes tell."""

import errno
import os
import stat
import subprocess
import sys

import pytest

proves = pytest.mark.proves
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")

NOBODY = 65534


def run_as_nobody(code, *arguments):
    """What a program writes that runs as a user without any rights."""
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", code, *map(str, arguments)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@proves("S-8", "S-9", "S-10", "S-11")
def test_stat_shows_what_tools_rely_on(shown, big):
    info = os.lstat(shown.directory / "big")
    assert (info.st_uid, info.st_gid, info.st_nlink) == (os.getuid(), os.getgid(), 1)
    assert (info.st_size, info.st_blocks, info.st_blksize) == (len(big), -(-len(big) // 512), 4096)
    assert info.st_atime_ns == info.st_ctime_ns == info.st_mtime_ns == 10**18 + 7
    with open(shown.directory / "big", "rb") as file:
        assert os.fstat(file.fileno()) == info
    assert os.lstat(shown.directory / "before1970").st_mtime_ns == -1_234_567_891
    assert os.lstat(shown.directory / "sub").st_nlink == 1
    assert os.lstat(shown.directory / "sub").st_size == 0
    assert os.lstat(shown.directory / "links/inside").st_size == len("../with space")


@proves("S-12")
def test_numbers_of_inodes_are_unique_and_stay(shown_by):
    def numbers():
        return {
            os.path.join(directory, name): os.lstat(os.path.join(directory, name)).st_ino
            for directory, directories, files in os.walk(shown_by.directory)
            for name in directories + files
        }

    first = numbers()
    assert len(set(first.values())) == len(first) > 3000
    listed = {
        entry.path: entry.inode()
        for directory, _, _ in os.walk(shown_by.directory)
        for entry in os.scandir(directory)
    }
    assert listed == first
    # The kernel shall ask again.
    if os.getuid() == 0:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
    assert numbers() == first


@proves("S-4")
def test_special_bits_are_not_shown(shown_by):
    assert stat.S_IMODE(os.stat(shown_by.directory / "special").st_mode) == 0o755


@proves("S-13")
def test_permissions_are_those_of_the_owner(shown_by):
    assert os.access(shown_by.directory / "with space", os.R_OK)
    assert not os.access(shown_by.directory / "with space", os.W_OK)
    assert os.access(shown_by.directory / "sub/run.sh", os.X_OK)
    assert not os.access(shown_by.directory / "sub/needle.txt", os.X_OK)


@as_root
@proves("S-14")
def test_nobody_else_may_look(shown_by):
    code = """
import os, sys
try:
    os.stat(sys.argv[1])
except OSError as error:
    print(error.errno)
"""
    assert run_as_nobody(code, shown_by.directory / "big") == str(errno.EACCES)


@as_root
@proves("S-14")
def test_others_may_look_where_that_was_asked_for_and_modes_count_for_them(engine, serve, stored, ending):
    top, snapshots, identifier, _ = stored
    served = serve(top, snapshots, identifier, variant=engine, allow_other=True)
    code = """
import os, sys
for name in sys.argv[2:]:
    try:
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            print(file.read(1).decode(), end=" ")
    except OSError as error:
        print(error.errno, end=" ")
"""
    names = ("sub/needle.txt", "private", "sub/closed/in")
    found = run_as_nobody(code, served.directory, *names)
    ending(served)
    assert found.split() == ["a", str(errno.EACCES), str(errno.EACCES)]


@proves("S-15")
def test_the_hash_of_a_file_is_an_extended_attribute(shown_by, stored):
    file = shown_by.directory / "big"
    assert os.listxattr(file) == ["user.replicate.hash"]
    value = os.getxattr(file, "user.replicate.hash")
    assert value == stored[-1].find(b"big").hash.hex().encode()
    with pytest.raises(OSError) as raised:
        os.getxattr(file, "user.other")
    assert raised.value.errno == errno.ENODATA
    assert os.listxattr(shown_by.directory) == os.listxattr(shown_by.directory / "sub") == []
    assert os.listxattr(shown_by.directory / "links/inside", follow_symlinks=False) == []


@proves("S-15")
def test_a_buffer_that_is_too_small_for_an_attribute_is_refused(shown_by):
    # Python would ask for the size first.
    code = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(10)
found = libc.getxattr(sys.argv[1].encode(), b"user.replicate.hash", buffer, 10)
print(found, ctypes.get_errno())
found = libc.listxattr(sys.argv[1].encode(), buffer, 10)
print(found, ctypes.get_errno())
print(libc.getxattr(sys.argv[1].encode(), b"user.replicate.hash", None, 0))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, shown_by.directory / "big"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-1", str(errno.ERANGE), "-1", str(errno.ERANGE), "64"]
