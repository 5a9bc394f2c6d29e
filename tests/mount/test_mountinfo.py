import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from replicated.mount.life.mountinfo import find_holders, find_mounted, parse_line, read_mountinfo

LINE = (
    b"42 27 0:39 / /tmp/with\\040space\\012and\\134more ro,nosuid,nodev shared:1 master:2"
    b" - fuse.replicate replicate:abc\\011 ro,user_id=%d,group_id=0,default_permissions\n"
)


def test_a_line_is_taken_apart_and_its_escapes_undone():
    mounted = parse_line(LINE % os.getuid())
    assert mounted.directory == b"/tmp/with space\nand\\more"
    assert (mounted.type, mounted.source, mounted.device) == (b"fuse.replicate", b"replicate:abc\t", "0:39")
    assert mounted.is_ours


def test_the_mount_of_somebody_else_is_not_ours():
    assert not parse_line(LINE % (os.getuid() + 1)).is_ours
    assert not parse_line(b"25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw,size=1k\n").is_ours


@given(st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name))
def test_any_directory_survives_the_kernels_escapes(name):
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in name)
    line = b"1 2 0:3 / /" + escaped + b" rw - tmpfs none rw\n"
    assert parse_line(line).directory == b"/" + name


def test_the_kernels_own_list_can_be_read():
    assert any(mounted.directory == b"/proc" for mounted in read_mountinfo())
    assert find_mounted(b"/proc").type == b"proc"
    assert find_mounted(b"/pro") is None


def test_who_uses_a_directory_is_found(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in2").mkdir()
    (tmp_path / "in/mapped").write_bytes(b"x" * 4096)
    script = (
        "import mmap, sys\n"
        "file = open('in/mapped', 'r+b')\n"
        "mapped = mmap.mmap(file.fileno(), 0)\n"
        "file.close()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        for directory, expected in (("in", True), ("in2", False), (".", True)):
            holders = find_holders(os.fsencode((tmp_path / directory).resolve()))
            assert (process.pid in {holder.pid for holder in holders}) is expected
        process.stdin.close()
