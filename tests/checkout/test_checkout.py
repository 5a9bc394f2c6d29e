import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import CheckoutConflict, CheckoutFailed, NotFound, RepositoryDamaged
from replicated.checkout import plan
from replicated.checkout.planning import PROTECTED_NAMES

ODD = {
    b"with space": b"1",
    b"new\nline": b"2",
    b"\xff\xfe": (b"3", 0o400, 1),
    b"-rf": b"4",
    b"empty": b"",
    b"sub": (
        {
            b"run.sh": (b"#!/bin/sh\n", 0o755, 10**18 + 1),
            b"empty": ({}, 0o700, 10**18 + 2),
            b"locked": ({b"in": (b"x", 0o400, 5)}, 0o500, 10**18 + 3),
            b"out": "/etc/passwd",
            b"dangling": "nowhere",
            b"inside": "../with space",
        },
        0o755,
        10**18 + 4,
    ),
}


def test_everything_is_restored(memory_tree, checkout, described, tmp_path):
    tree = memory_tree(ODD)
    checkout(tree, tmp_path / "out")
    assert described(tmp_path / "out") == described(tree)


names = st.binary(min_size=1, max_size=6).filter(
    lambda name: name not in {b".", b"..", *PROTECTED_NAMES} and b"/" not in name and b"\0" not in name
)
modes = st.integers(0, 0o7777)
times = st.integers(-(10**18), 4 * 10**18)
files = st.tuples(st.binary(max_size=40), modes, times)
links = st.tuples(
    st.binary(min_size=1, max_size=9).filter(lambda target: b"\0" not in target).map(os.fsdecode),
    st.just(0o777),
    times,
)
trees = st.recursive(
    st.dictionaries(names, files | links, max_size=4),
    lambda below: st.dictionaries(names, files | links | st.tuples(below, modes, times), max_size=4),
    max_leaves=6,
)


@given(trees)
def test_any_tree_round_trips(memory_tree, checkout, described, content):
    tree = memory_tree(content)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "out")
        checkout(tree, output)
        assert described(output) == described(tree)


@given(trees, trees)
def test_any_tree_replaces_any_other(memory_tree, checkout, described, before, after):
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "out")
        checkout(memory_tree(before), output)
        wanted = memory_tree(after)
        checkout(wanted, output, force=True, delete=True)
        assert described(output) == described(wanted)
        again = checkout(wanted, output, force=True, delete=True)
        assert {verb for verb, _ in again} <= {"keep"}


def test_special_permission_bits_are_stripped(memory_tree, checkout, tmp_path):
    checkout(memory_tree({b"f": (b"x", 0o6755, 1), b"d": ({}, 0o1777, 1)}), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/f").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out/d").stat().st_mode) == 0o777


def test_a_new_output_directory_gets_mode_and_time_of_the_root(memory_tree, checkout, tmp_path):
    checkout(memory_tree(({b"f": b""}, 0o711, 10**18)), tmp_path / "a/b/out")
    info = (tmp_path / "a/b/out").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (0o711, 10**18)


def test_an_existing_output_directory_keeps_its_mode(memory_tree, checkout, tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    checkout(memory_tree(({b"f": b""}, 0o711, 10**18)), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_deep_tree_round_trips(memory_tree, checkout, described, tmp_path):
    content = {b"f": b"x"}
    for _ in range(300):
        content = {b"d": content}
    tree = memory_tree(content)
    checkout(tree, tmp_path / "out")
    assert described(tmp_path / "out") == described(tree)


def test_a_big_file_is_written_with_holes_and_progress(memory_tree, checkout, tmp_path):
    data = os.urandom(100_000) + bytes(20 << 20) + os.urandom(3) + bytes(100_001)
    seen = []
    tree = memory_tree({b"big": data, b"small": b"12"})
    checkout(tree, tmp_path / "out", on_progress=lambda files, size: seen.append((files, size)))
    assert (tmp_path / "out/big").read_bytes() == data
    assert (tmp_path / "out/big").stat().st_blocks * 512 < 2 << 20
    assert seen == sorted(seen)
    assert seen[-1] == (2, len(data) + 2)
    assert len(seen) > 4


def test_a_directory_with_files_is_a_conflict(memory_tree, checkout, described, tmp_path):
    (tmp_path / "mine").write_bytes(b"m")
    before = described(tmp_path)
    with pytest.raises(CheckoutConflict, match="mine") as raised:
        checkout(memory_tree({b"f": b"1"}), tmp_path)
    assert "--force" in raised.value.hint
    assert described(tmp_path) == before


def test_a_file_is_no_output_directory(memory_tree, checkout, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckoutConflict, match="not a directory"):
        checkout(memory_tree({}), tmp_path / "file", force=True)


def test_force_leaves_other_files_alone(memory_tree, checkout, tmp_path):
    (tmp_path / "mine").write_bytes(b"m")
    (tmp_path / "f").write_bytes(b"old")
    checkout(memory_tree({b"f": b"new"}), tmp_path, force=True)
    assert (tmp_path / "mine").read_bytes() == b"m"
    assert (tmp_path / "f").read_bytes() == b"new"


def test_what_is_right_already_is_kept(memory_tree, checkout, tmp_path):
    tree = memory_tree({b"same": b"1", b"time": b"2", b"bytes": b"3"})
    checkout(tree, tmp_path / "out")
    inodes = {name: (tmp_path / "out" / name).stat().st_ino for name in ("same", "time", "bytes")}
    os.utime(tmp_path / "out/time", ns=(1, 1))
    (tmp_path / "out/bytes").write_bytes(b"4")
    os.utime(tmp_path / "out/bytes", ns=(10**18 + 7, 10**18 + 7))
    verbs = {path: verb for verb, path in checkout(tree, tmp_path / "out", force=True)}
    assert verbs == {b"same": "keep", b"time": "replace", b"bytes": "replace"}
    assert (tmp_path / "out/bytes").read_bytes() == b"3"
    assert (tmp_path / "out/time").stat().st_mtime_ns == 10**18 + 7
    # The content of this one was right, so it is still the same file.
    assert (tmp_path / "out/time").stat().st_ino == inodes["time"]
    assert (tmp_path / "out/same").stat().st_ino == inodes["same"]


def test_a_plan_changes_nothing(memory_tree, checkout, described, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/f").write_bytes(b"old")
    (tmp_path / "out/extra").write_bytes(b"x")
    before = described(tmp_path)
    steps = plan(memory_tree({b"f": b"new", b"g": b"12"}), os.fsencode(tmp_path / "out"), delete=True)
    assert described(tmp_path) == before
    assert [(action.verb, action.path) for action in steps.actions] == [
        ("replace", b"f"),
        ("create", b"g"),
        ("delete", b"extra"),
    ]
    assert (steps.file_count, steps.size_bytes) == (2, 5)


def test_delete_spares_what_is_protected(memory_tree, checkout, described, tmp_path):
    for name in (".git/config", ".replicate/x", "sub/.git/config", "sub/gone/deep", "gone"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "replicate.yaml").write_bytes(b"")
    checkout(memory_tree({b"f": b"1"}), tmp_path, force=True, delete=True)
    left = {path for path, entry in described(tmp_path).items() if entry[0] == "file"}
    assert left == {b".git/config", b".replicate/x", b"sub/.git/config", b"replicate.yaml", b"f"}


def test_a_directory_in_the_place_of_a_file_is_replaced(memory_tree, checkout, tmp_path):
    (tmp_path / "f/deep").mkdir(parents=True)
    (tmp_path / "f/deep/x").write_bytes(b"x")
    actions = checkout(memory_tree({b"f": b"new"}), tmp_path, force=True)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert actions == [
        ("delete", b"f/deep/x"),
        ("delete", b"f/deep"),
        ("replace", b"f"),
    ]


def test_a_directory_with_something_protected_is_not_replaced(memory_tree, checkout, described, tmp_path):
    (tmp_path / "f/.git").mkdir(parents=True)
    before = described(tmp_path)
    with pytest.raises(CheckoutConflict, match="never deleted"):
        checkout(memory_tree({b"f": b"new"}), tmp_path, force=True)
    assert described(tmp_path) == before


@pytest.fixture
def outside(tmp_path):
    """A directory beside the output that nothing may touch."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "f").write_bytes(b"precious")
    (directory / "f").chmod(0o640)
    os.utime(directory, ns=(5, 5))
    return directory


@pytest.mark.parametrize("delete", [False, True])
def test_links_in_the_target_are_never_followed(memory_tree, checkout, described, tmp_path, outside, delete):
    untouched = described(outside), outside.stat().st_mtime_ns
    output = tmp_path / "out"
    (output / "sub").mkdir(parents=True)
    (output / "d").symlink_to(outside)
    (output / "sub/f").symlink_to(outside / "f")
    (output / "dangling").symlink_to(outside / "new")
    (output / "extra").symlink_to(outside)
    os.link(outside / "f", output / "hard")
    tree = memory_tree(
        {
            b"d": {b"f": b"mine", b"n": b"1"},
            b"sub": {b"f": b"mine"},
            b"dangling": b"mine",
            b"hard": (b"precious", 0o600, 77),
        }
    )
    checkout(tree, output, force=True, delete=delete)
    assert (described(outside), outside.stat().st_mtime_ns) == untouched
    if not delete:
        (output / "extra").unlink()
    assert described(output) == described(tree)


def test_the_output_may_be_a_link_to_a_directory(memory_tree, checkout, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    checkout(memory_tree({b"f": b"1"}), tmp_path / "link")
    assert (tmp_path / "real/f").read_bytes() == b"1"
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_in_the_way_is_replaced(memory_tree, checkout, tmp_path):
    os.mkfifo(tmp_path / "f")
    checkout(memory_tree({b"f": b""}), tmp_path, force=True)
    assert stat.S_ISREG((tmp_path / "f").stat().st_mode)


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/etc", b"", b"a\0b"])
def test_a_hostile_name_is_refused(memory_tree, checkout, described, tmp_path, name):
    before = described(tmp_path)
    with pytest.raises(RepositoryDamaged, match="impossible file name"):
        checkout(memory_tree({b"sub": {name: b"x"}}), tmp_path / "out")
    assert described(tmp_path) == before


def test_one_file_is_extracted_at_its_place(memory_tree, checkout, described, tmp_path):
    tree = memory_tree({b"sub": ({b"x": b"1", b"y": b"2"}, 0o711, 9), b"z": b"3"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_bytes(b"")
    checkout(tree, tmp_path / "out", path=b"./sub//x")
    assert (tmp_path / "out/sub/x").read_bytes() == b"1"
    assert set(described(tmp_path / "out")) == {b"mine", b"sub", b"sub/x"}
    assert stat.S_IMODE((tmp_path / "out/sub").stat().st_mode) == 0o711


def test_one_file_that_exists_is_a_conflict(memory_tree, checkout, tmp_path):
    tree = memory_tree({b"sub": {b"x": b"1"}})
    (tmp_path / "sub").mkdir(mode=0o700)
    (tmp_path / "sub/x").write_bytes(b"old")
    with pytest.raises(CheckoutConflict, match="sub/x"):
        checkout(tree, tmp_path, path=b"sub/x")
    checkout(tree, tmp_path, path=b"sub/x", force=True)
    assert (tmp_path / "sub/x").read_bytes() == b"1"
    # The directory was there before, and nobody asked for it.
    assert stat.S_IMODE((tmp_path / "sub").stat().st_mode) == 0o700


def test_one_directory_is_extracted_and_only_there_is_deleted(memory_tree, checkout, described, tmp_path):
    tree = memory_tree({b"sub": {b"x": b"1"}, b"z": b"3"})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/extra").write_bytes(b"")
    (tmp_path / "mine").write_bytes(b"")
    with pytest.raises(CheckoutConflict, match="sub/extra"):
        checkout(tree, tmp_path, path=b"sub", delete=True)
    checkout(tree, tmp_path, path=b"sub", force=True, delete=True)
    assert set(described(tmp_path)) == {b"sub", b"sub/x", b"mine"}


def test_a_link_on_the_way_to_a_path_is_a_conflict_and_never_followed(
    memory_tree, checkout, described, tmp_path, outside
):
    untouched = described(outside)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(outside)
    tree = memory_tree({b"sub": {b"f": b"1"}})
    with pytest.raises(CheckoutConflict, match="sub"):
        checkout(tree, tmp_path / "out", path=b"sub/f")
    checkout(tree, tmp_path / "out", path=b"sub/f", force=True)
    assert described(outside) == untouched
    assert (tmp_path / "out/sub/f").read_bytes() == b"1"


def test_an_absent_path_is_named_with_what_comes_near(memory_tree, checkout, tmp_path):
    with pytest.raises(NotFound, match=r"sub/trian\.py") as raised:
        checkout(memory_tree({b"sub": {b"train.py": b""}}), tmp_path, path=b"sub/trian.py")
    assert "sub/train.py" in raised.value.hint


@pytest.mark.parametrize("path", [b"/etc/passwd", b"../x", b"a/../b"])
def test_a_path_that_leads_out_is_not_found(memory_tree, checkout, tmp_path, path):
    with pytest.raises(NotFound):
        checkout(memory_tree({b"a": b""}), tmp_path, path=path)


class Cut:
    """A reader whose file ends too early."""

    def pread(self, offset, length):
        return b"\1" * max(0, min(length, (5 << 20) - offset))


class Unreadable:
    def pread(self, offset, length):
        raise RepositoryDamaged("chunk 3 is gone", hint="run fsck")


class Wrong:
    def pread(self, offset, length):
        return b"\2" * length


@pytest.mark.parametrize("reader", [Cut(), Unreadable(), Wrong()])
def test_a_failure_leaves_the_old_file_and_names_the_path(memory_tree, checkout, described, tmp_path, reader):
    tree = memory_tree({b"a": b"1", b"sub": ({b"bad": b"\1" * (6 << 20)}, 0o500, 3)})
    tree.readers[b"bad"] = reader
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/bad").write_bytes(b"old")
    with pytest.raises(RepositoryDamaged, match="sub/bad"):
        checkout(tree, tmp_path, force=True)
    assert (tmp_path / "sub/bad").read_bytes() == b"old"
    assert set(described(tmp_path)) == {b"a", b"sub", b"sub/bad"}


def test_a_full_disk_is_named_and_leaves_nothing_half_written(memory_tree, checkout, described, tmp_path):
    tree = memory_tree({b"big": os.urandom(3 << 20)})
    (tmp_path / "out").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "out"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        with pytest.raises(CheckoutFailed, match=r"big.*space") as raised:
            checkout(tree, tmp_path / "out")
        assert "space" in raised.value.hint
        assert described(tmp_path / "out") == {}
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)


def test_a_name_that_is_too_long_is_named(memory_tree, checkout, tmp_path):
    with pytest.raises(CheckoutFailed, match="nnn"):
        checkout(memory_tree({b"n" * 256: b""}), tmp_path)


AS_ANOTHER_USER = """
import os, sys
sys.path[:0] = [{tests!r}]
from conftest import MemoryTree
from replicated.checkout import execute, plan
os.setgid(65534); os.setuid(65534)
output = {output!r}
for content in (b"1", b"2"):
    tree = MemoryTree({{b"d": ({{b"e": ({{b"f": (content, 0o400, 5)}}, 0o500, 6)}}, 0o500, 7)}})
    execute(plan(tree, output, delete=True), tree)
    assert open(output + b"/d/e/f", "rb").read() == content
    assert os.stat(output + b"/d/e").st_mode & 0o7777 == 0o500
    assert os.stat(output + b"/d").st_mtime_ns == 7
tree = MemoryTree({{b"g": b""}})
execute(plan(tree, output, delete=True), tree)
assert os.listdir(output) == [b"g"]
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, because root may write everywhere")
def test_directories_without_write_permission_do_not_hinder():
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        output = Path(directory, "out")
        output.mkdir()
        os.chown(output, 65534, 65534)
        script = AS_ANOTHER_USER.format(tests=str(Path(__file__).parent.parent), output=os.fsencode(output))
        finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
