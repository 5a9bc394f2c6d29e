"""What cannot be done, and the errno that says so."""

import array
import errno
import fcntl
import os
import stat

import pytest

proves = pytest.mark.proves


def refusal(operation, *arguments):
    with pytest.raises(OSError) as raised:
        operation(*arguments)
    return raised.value.errno


@proves("S-40")
@pytest.mark.parametrize(
    "attempt",
    [
        lambda d: (d / "empty").write_bytes(b"1"),
        lambda d: os.open(d / "empty", os.O_RDWR),
        lambda d: os.open(d / "empty", os.O_RDONLY | os.O_TRUNC),
        lambda d: os.open(d / "empty", os.O_WRONLY | os.O_APPEND),
        lambda d: os.open(d / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        lambda d: os.open(d / "new", os.O_RDONLY | os.O_CREAT),
        lambda d: os.open(d, os.O_TMPFILE | os.O_RDWR),
        lambda d: os.mkdir(d / "new"),
        lambda d: os.unlink(d / "empty"),
        lambda d: os.rmdir(d / "void"),
        lambda d: os.rename(d / "empty", d / "other"),
        lambda d: os.rename(d / "empty", d / "case"),
        lambda d: os.chmod(d / "empty", 0o777),
        lambda d: os.chown(d / "empty", 0, 0),
        lambda d: os.lchown(d / "links/inside", 0, 0),
        lambda d: os.utime(d / "empty"),
        lambda d: os.truncate(d / "empty", 3),
        lambda d: os.symlink("x", d / "new"),
        lambda d: os.link(d / "empty", d / "new"),
        lambda d: os.mkfifo(d / "new"),
        lambda d: os.mknod(d / "new"),
        lambda d: os.mknod(d / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        lambda d: os.setxattr(d / "empty", "user.x", b"1"),
        lambda d: os.removexattr(d / "big", "user.replicate.hash"),
    ],
)
def test_every_way_of_writing_is_refused(shown_by, attempt):
    assert refusal(attempt, shown_by.directory) == errno.EROFS


@proves("S-40")
def test_what_is_open_for_reading_cannot_be_written(shown_by):
    descriptor = os.open(shown_by.directory / "big", os.O_RDONLY)
    assert refusal(os.write, descriptor, b"1") == errno.EBADF
    assert refusal(os.ftruncate, descriptor, 0) in (errno.EINVAL, errno.EBADF)
    assert refusal(os.posix_fallocate, descriptor, 0, 10) == errno.EBADF
    assert refusal(os.fchmod, descriptor, 0o600) == errno.EROFS
    assert refusal(os.utime, descriptor) == errno.EROFS
    os.close(descriptor)


@proves("S-41")
def test_creating_what_is_there_opens_it(shown_by):
    descriptor = os.open(shown_by.directory / "with space", os.O_RDONLY | os.O_CREAT)
    assert os.read(descriptor, 10) == b"1"
    os.close(descriptor)
    exclusive = os.O_RDONLY | os.O_CREAT | os.O_EXCL
    assert refusal(os.open, shown_by.directory / "with space", exclusive) == errno.EEXIST
    assert refusal(os.mkdir, shown_by.directory / "void") == errno.EEXIST


@proves("S-42")
def test_things_of_another_kind_are_refused(shown_by):
    directory = shown_by.directory
    assert refusal(os.open, directory / "sub", os.O_WRONLY) == errno.EISDIR
    descriptor = os.open(directory / "sub", os.O_RDONLY)
    assert refusal(os.read, descriptor, 1) == errno.EISDIR
    os.close(descriptor)
    assert refusal(os.open, directory / "big", os.O_RDONLY | os.O_DIRECTORY) == errno.ENOTDIR
    assert refusal(os.listdir, directory / "big") == errno.ENOTDIR
    assert refusal(os.stat, f"{directory}/big/") == errno.ENOTDIR
    assert refusal(os.open, directory / "links/inside", os.O_RDONLY | os.O_NOFOLLOW) == errno.ELOOP
    assert refusal(os.readlink, directory / "big") == errno.EINVAL
    assert refusal(os.readlink, directory / "sub") == errno.EINVAL


@proves("S-43")
def test_requests_that_only_other_file_systems_know_are_refused(shown_by):
    with open(shown_by.directory / "big", "rb") as file:
        # FS_IOC_GETFLAGS
        assert refusal(fcntl.ioctl, file, 0x80086601, array.array("l", [0])) == errno.ENOTTY
