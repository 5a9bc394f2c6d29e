"""What is mounted is what was saved: the same as a checkout of it."""

import os
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from replicated.mount.life.mountinfo import find_mounted

proves = pytest.mark.proves


@proves("S-1", "S-2", "S-3", "S-4", "S-8")
def test_everything_is_as_it_was_saved(shown, stored, described):
    tree = stored[-1]
    assert described(shown.directory) == described(tree)
    # Once more, from the kernel's caches.
    assert described(shown.directory) == described(tree)
    assert os.stat(shown.directory).st_mtime_ns == tree.root.mtime_ns


@proves("S-1")
def test_a_mount_equals_a_checkout(shown, stored, checkout, described, tmp_path):
    checkout(stored[-1], tmp_path / "out")
    assert described(shown.directory) == described(tmp_path / "out")


names = st.binary(min_size=1, max_size=6).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
modes = st.integers(0, 0o7777)
# What ext4 can keep for a checkout.
times = st.integers((1 - 2**31) * 10**9, 2**33 * 10**9)
# What lies at the borders of chunks, of pages, and of what the kernel asks for at once.
sizes = st.sampled_from([0, 1, 4095, 4096, 4097, 131_071, 131_073, 1_048_575, 1_048_577, 2_500_000])
files = st.tuples(st.binary(max_size=40) | sizes, modes, times)
links = st.tuples(
    st.binary(min_size=1, max_size=20).filter(lambda target: b"\0" not in target).map(os.fsdecode),
    st.just(0o777),
    times,
)


def directories(below):
    return st.dictionaries(names, files | links | st.tuples(below, modes, times), max_size=12)


trees = st.dictionaries(
    names,
    files | links | st.tuples(directories(directories(st.just({}))), modes, times),
    min_size=6,
    max_size=12,
)


def filled(content):
    """The same with random bytes for sizes."""
    if isinstance(content, dict):
        return {name: filled(entry) for name, entry in content.items()}
    if isinstance(content, tuple):
        return (filled(content[0]), *content[1:])
    return random.Random(content).randbytes(content) if isinstance(content, int) else content


@proves("S-1")
@settings(max_examples=5, phases=[Phase.generate])  # each example takes a mount: no shrinking
@given(content=trees)
def test_any_tree_is_shown_as_a_checkout_writes_it(
    content, engine, serve, ending, make_snapshots, memory_tree, checkout, described, tmp_path_factory
):
    top = tmp_path_factory.mktemp("any")
    snapshots = make_snapshots(top / "repository", top / "cache", memory_tree)
    identifier, tree = snapshots.add(filled(content))
    snapshots.close()
    served = serve(top, snapshots, identifier, variant=engine)
    try:
        # As a user who may not read everything, only the tools of the test would fail.
        assert described(served.directory) == described(tree)
        checkout(tree, top / "out")
        assert described(served.directory) == described(top / "out")
    finally:
        ending(served)


@proves("S-5")
def test_later_snapshots_are_laid_over_earlier_ones(
    engine, serve, ending, make_snapshots, memory_tree, described, tmp_path
):
    snapshots = make_snapshots(tmp_path / "repository", tmp_path / "cache", memory_tree)
    code, _ = snapshots.add({b"train.py": b"code", b"d": {b"a": b"1", b"b": b"1"}, b"x": {b"gone": b""}})
    checkpoint, _ = snapshots.add({b"model": b"weights", b"d": {b"b": b"2"}, b"x": b"file"})
    snapshots.close()
    served = serve(tmp_path, snapshots, code, checkpoint, variant=engine)
    found = {path: entry[3] for path, entry in described(served.directory).items() if entry[0] == "file"}
    ending(served)
    assert found == {
        b"train.py": b"code",
        b"model": b"weights",
        b"d/a": b"1",
        b"d/b": b"2",
        b"x": b"file",
    }


@proves("S-2")
def test_names_are_told_apart_by_their_bytes(shown_by):
    directory = os.fsencode(shown_by.directory)

    def content(name):
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()

    assert (content(b"case"), content(b"CASE")) == (b"lower", b"upper")
    assert content("é".encode()) == b"one code point"
    assert content("e\u0301".encode()) == b"two code points"
    assert content(b"n" * 255) == b"longest"
    with pytest.raises(OSError, match="File name too long"):
        os.stat(os.path.join(directory, b"n" * 256))


@proves("S-31")
def test_tools_work_as_on_any_file_system(shown_by, stored):
    directory = shown_by.directory
    paths = {path for path, _ in stored[-1].walk()}
    found = subprocess.run(["find", ".", "-print0"], cwd=directory, capture_output=True, check=True)
    assert set(found.stdout.rstrip(b"\0").split(b"\0")) == {b"."} | {b"./" + path for path in paths}
    grep = subprocess.run(["grep", "-rl", "needle", "sub"], cwd=directory, capture_output=True, check=True)
    assert grep.stdout == b"sub/needle.txt\n"
    ran = subprocess.run([directory / "sub/run.sh"], capture_output=True, check=True)
    assert ran.stdout == b"ran\n"
    packed = subprocess.run(["tar", "-c", "sub", "links", "big"], cwd=directory, capture_output=True)
    assert (packed.returncode, packed.stderr) == (0, b"")
    listed = subprocess.run(["tar", "-t"], input=packed.stdout, capture_output=True, check=True)
    assert {Path(os.fsdecode(line)).name for line in listed.stdout.splitlines()} >= {"run.sh", "loop", "big"}
    same = subprocess.run(["cmp", directory / "big", "-"], input=stored[-1].find(b"big").content.node)
    assert same.returncode == 0


@proves("S-6")
def test_it_is_mounted_as_it_should_be(shown_by, stored):
    mounted = find_mounted(os.fsencode(shown_by.directory))
    assert mounted.type == b"fuse.replicate"
    assert mounted.source == b"replicate:test"
    flags = os.statvfs(shown_by.directory).f_flag
    assert flags & os.ST_RDONLY and flags & os.ST_NOSUID and flags & os.ST_NODEV


@proves("S-7")
def test_the_size_of_the_whole_is_shown(shown_by, stored):
    usage = os.statvfs(shown_by.directory)
    nodes = [node for _, node in stored[-1].walk()]
    assert usage.f_blocks * usage.f_frsize >= sum(node.size for node in nodes if node.type == "file")
    assert (usage.f_bfree, usage.f_bavail, usage.f_ffree) == (0, 0, 0)
    assert usage.f_files == len(nodes) + 1
    assert usage.f_namemax == 255
