"""Held files on every file system that can be made here; needs root, as mounting does."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from replicate.errors import CaptureFailed
from replicated.file_systems import honours_leases, may_share_blocks, tells_changes
from replicated.snapshot.held import HeldFiles

DEADLINE_S = 60
CONTENT = bytes(range(256)) * 4096
SHARING = ("xfs", "btrfs")
IMAGE_BYTES = 400 << 20


def run(*command):
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=DEADLINE_S)


def mount_or_skip(*command):
    try:
        run("mount", *command)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"mount is not possible here: {getattr(error, 'stderr', error)!r}")


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a new file system of a kind and says where."""
    mounted = []

    def mount_one(kind, *options):
        number = len(mounted)
        place = tmp_path / f"{kind}-{number}"
        place.mkdir()
        if kind == "tmpfs":
            mount_or_skip("-t", "tmpfs", *options, "tmpfs", place)
        elif kind == "overlay":
            layers = mount_one("tmpfs")
            for name in ("lower", "upper", "work"):
                (layers / name).mkdir()
            rows = ",".join(f"{name}dir={layers / name}" for name in ("lower", "upper", "work"))
            mount_or_skip("-t", "overlay", "-o", rows, "overlay", place)
        else:
            if shutil.which(f"mkfs.{kind}") is None:
                pytest.skip(f"there is no mkfs.{kind}")
            image = tmp_path / f"image-{number}"
            with image.open("wb") as file:
                file.truncate(IMAGE_BYTES)
            run(f"mkfs.{kind}", "-q", image)
            # mount makes the loop device, and unmounting frees it.
            mount_or_skip("-t", kind, "-o", "loop", image, place)
        mounted.append(place)
        return place

    yield mount_one
    for place in reversed(mounted):
        run("umount", place)


@pytest.fixture
def make_held():
    made = []

    def make(spool):
        spool.mkdir()
        held = HeldFiles(lambda snapshot: spool / snapshot)
        held.start()
        made.append(held)
        return held

    yield make
    for held in made:
        held.stop()


def hold(held, path, snapshot="a"):
    return held.hold(snapshot, os.open(path, os.O_RDONLY))


def write(path, mode="wb"):
    code = "import sys; open(sys.argv[1], sys.argv[2]).write(b'new')"
    subprocess.run([sys.executable, "-S", "-c", code, path, mode], check=True, timeout=DEADLINE_S)


def content(held, snapshot="a", number=0):
    opened = held.open(snapshot, number)
    with open(opened.descriptor, "rb") as file:
        return os.pread(file.fileno(), 2 * len(CONTENT), 0)


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        os.sched_yield()


ALL = ["ext4", "xfs", "btrfs", "tmpfs", "overlay"]


@pytest.mark.parametrize("kind", ALL)
def test_what_a_file_system_can_do_is_known(mount, kind):
    descriptor = os.open(mount(kind), os.O_RDONLY)
    try:
        assert honours_leases(descriptor)
        assert tells_changes(descriptor)
        assert may_share_blocks(descriptor, descriptor) == (kind in SHARING)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", ["wb", "r+b", "ab"])
@pytest.mark.parametrize("kind", ALL)
def test_a_held_file_is_what_it_was(mount, make_held, tmp_path, kind, mode):
    path = mount(kind) / "file"
    path.write_bytes(CONTENT)
    held = make_held(tmp_path / "spool")
    assert hold(held, path) is not None
    write(path, mode)
    assert content(held) == CONTENT


def test_a_file_of_a_lower_layer_is_what_it_was_when_it_is_copied_up(mount, make_held, tmp_path):
    layers = mount("tmpfs")
    for name in ("lower", "upper", "work", "merged"):
        (layers / name).mkdir()
    (layers / "lower" / "file").write_bytes(CONTENT)
    rows = ",".join(f"{name}dir={layers / name}" for name in ("lower", "upper", "work"))
    mount_or_skip("-t", "overlay", "-o", rows, "overlay", layers / "merged")
    held = make_held(tmp_path / "spool")
    try:
        assert hold(held, layers / "merged" / "file") is not None
        write(layers / "merged" / "file", "r+b")
        assert content(held) == CONTENT
    finally:
        held.stop()
        run("umount", layers / "merged")


@pytest.mark.parametrize("kind", SHARING)
def test_where_the_spool_can_share_blocks_a_lease_soon_becomes_a_reflink(mount, make_held, kind):
    place = mount(kind)
    (place / "file").write_bytes(CONTENT)
    held = make_held(place / "spool")
    assert hold(held, place / "file") is not None
    held.share("b", os.stat(place / "file"))
    until(lambda: held.count == 0)
    write(place / "file")
    assert content(held) == content(held, "b") == CONTENT


@pytest.mark.parametrize("kind", SHARING)
def test_a_spool_on_another_file_system_of_that_kind_gets_nothing_before_a_writer_comes(
    mount, make_held, kind
):
    path = mount(kind) / "file"
    path.write_bytes(CONTENT)
    spool = mount(kind) / "spool"
    held = make_held(spool)
    hold(held, path)
    until(lambda: held._unshared)
    until(lambda: not next(iter(held._holdings.leased.values())).is_busy)
    assert held.count == 1
    assert not any(names for _, _, names in os.walk(spool))
    write(path)
    assert content(held) == CONTENT


def test_where_blocks_cannot_be_shared_no_spool_directory_is_made(mount, make_held):
    place = mount("ext4")
    (place / "file").write_bytes(CONTENT)
    held = make_held(place / "spool")
    hold(held, place / "file")
    until(lambda: held._unshared)
    assert held.count == 1
    assert os.listdir(place / "spool") == []


def test_without_room_for_the_copy_the_writer_goes_on_and_the_file_is_lost(mount, make_held, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT * 4)
    spool = mount("tmpfs", "-o", "size=1m") / "spool"
    held = make_held(spool)
    hold(held, path)
    write(path)
    with pytest.raises(CaptureFailed, match="No space left on device"):
        held.open("a", 0)
    assert (held.count, held.size_bytes) == (0, 0)
    assert os.listdir(spool / "a") == []
    held.release("a")


def test_without_room_a_file_cannot_be_secured_and_stays_held(mount, make_held, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT * 4)
    held = make_held(mount("tmpfs", "-o", "size=1m") / "spool")
    hold(held, path)
    with pytest.raises(OSError, match="No space left on device"):
        held.secure("a")
    assert held.count == 1
    os.close(held.open("a", 0).descriptor)


def test_a_file_is_copied_between_file_systems_of_different_kinds(mount, make_held):
    path = mount("tmpfs") / "file"
    with path.open("wb") as file:
        file.write(CONTENT)
        file.truncate(64 << 20)
    held = make_held(mount("xfs") / "spool")
    hold(held, path)
    write(path)
    opened = held.open("a", 0)
    info = os.fstat(opened.descriptor)
    assert (info.st_size, info.st_blocks * 512 < 8 << 20) == (64 << 20, True)
    assert os.pread(opened.descriptor, len(CONTENT) + 1, 0) == CONTENT + b"\0"
    os.close(opened.descriptor)
