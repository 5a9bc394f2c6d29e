"""Watches where the kernel refuses them, and mounts: each in a process with namespaces of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_PRELUDE = """
import ctypes, logging, os, resource, sys
from pathlib import Path
from replicated.snapshot.watch import FULL_WALK_S, TreeWatches

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
NEW_MOUNTS, NEW_USER, PRIVATE_BELOW, BIND, DETACH = 0x20000, 0x10000000, 0x44000, 0x1000, 2
libc = ctypes.CDLL(None, use_errno=True)
top = Path(sys.argv[1])
tree = top / "tree"

def check(result):
    if result != 0:
        print("SKIP", os.strerror(ctypes.get_errno()))
        sys.exit()

def enter_user_namespace(limit, value):
    check(libc.unshare(NEW_USER))
    Path("/proc/sys/user", limit).write_text(str(value))

def enter_mount_namespace():
    check(libc.unshare(NEW_MOUNTS))
    check(libc.mount(b"none", b"/", None, PRIVATE_BELOW, None))

def mount(kind, source, target, flags=0):
    check(libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, None))

def unmount(target, flags=0):
    check(libc.umount2(os.fsencode(target), flags))

def start(**options):
    watches = TreeWatches(min_files=0, **options)
    watches.start()
    return watches

def see(walk):
    for path, *_ in os.walk(os.fsencode(tree)):
        if not walk.is_unchanged(path):
            walk.add(path)
    return walk

def capture(watches, snapshot):
    see(watches.begin(b"key")).commit(snapshot)

def look(watches):
    walk = watches.begin(b"key")
    paths = [path for path, *_ in os.walk(os.fsencode(tree))]
    changed = sorted(os.path.relpath(os.fsdecode(path), tree) for path in walk.changed)
    unchanged = sorted(os.path.relpath(os.fsdecode(path), tree) for path in paths if walk.is_unchanged(path))
    walk.abandon()
    return walk.base, changed, unchanged

EVERYTHING = [".", "a", "a/b", "e"]
"""


def run(tmp_path: Path, program: str) -> list[str]:
    """The lines that a program prints, in a process of its own; a tree is there."""
    for name in ("a/b", "e"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "file").write_text(name)
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    if lines and lines[-1].startswith("SKIP"):
        pytest.skip(f"namespaces cannot be made here:{lines[-1].removeprefix('SKIP')}")
    return lines


def test_a_tree_is_not_watched_when_the_user_has_no_watches_left(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_user_namespace("max_inotify_watches", 3)
        watches = start(max_watches=100)
        for snapshot in "123":
            capture(watches, snapshot)
            assert look(watches) == ("", [], []), look(watches)
        assert watches.watch_count == 0
        watches.stop()
        """,
    )
    assert lines == [
        f"WARNING changes below {tmp_path}/tree are not watched:"
        " fs.inotify.max_user_watches is too low for it"
    ]


def test_a_tree_is_not_watched_when_the_user_has_no_instances_left(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_user_namespace("max_inotify_instances", 0)
        watches = start()
        capture(watches, "1")
        assert look(watches)[0] == ""
        watches.stop()
        """,
    )
    assert set(lines) == {"WARNING changes of files are not watched: [Errno 24] Too many open files"}


def test_a_tree_is_not_watched_when_no_descriptors_are_left(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        watches = start()
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        watches.begin(b"key").commit("1")
        assert watches.begin(b"key").base == ""
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        watches.stop()
        nothing = start()
        nothing.begin(b"key").commit("1")
        assert nothing.begin(b"key").base == ""
        nothing.stop()
        """,
    )
    assert set(lines) <= {
        "WARNING changes of files are not watched: [Errno 24] Too many open files",
        "WARNING changes of files are not watched: [Errno 24] Too many open files: '/proc/self/mountinfo'",
    }
    assert lines


def test_a_tree_is_unknown_after_something_was_mounted_in_it(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_mount_namespace()
        (top / "beside").mkdir()
        watches = start()
        capture(watches, "1")
        mount(b"tmpfs", "beside", top / "beside")
        print(look(watches) == ("1", [], EVERYTHING))
        mount(b"tmpfs", "over it", tree / "a")
        print(look(watches))
        capture(watches, "2")
        (tree / "a/file").write_text("new")
        print(look(watches))
        unmount(tree / "a")
        print(look(watches))
        capture(watches, "3")
        print(look(watches) == ("3", [], EVERYTHING))
        during = see(watches.begin(b"key"))
        mount(b"tmpfs", "over it", tree / "a/b")
        during.commit("4")
        print(look(watches))
        watches.stop()
        """,
    )
    assert lines == [
        "True",
        "('', [], [])",
        "('2', ['a'], ['.', 'e'])",
        "('', [], [])",
        "True",
        "('', [], [])",
    ]


def test_a_tree_that_is_unmounted_behind_the_back_of_a_walk_is_unknown(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_mount_namespace()
        mount(b"tmpfs", "tree", tree)
        (tree / "a").mkdir()
        watches = start()
        capture(watches, "1")
        print(look(watches))
        during = see(watches.begin(b"key"))
        unmount(tree, DETACH)
        during.commit("2")
        print(look(watches))
        watches.stop()
        """,
    )
    assert lines == ["('1', [], ['.', 'a'])", "('', [], [])"]


def test_a_directory_on_a_file_system_that_does_not_tell_is_listed_every_time(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_mount_namespace()
        (top / "name with a space").symlink_to(tree)
        tree = top / "name with a space"
        mount(b"tmpfs", "another", tree / "a")
        (tree / "a/b/c").mkdir(parents=True)
        device = (tree / "a").stat().st_dev
        watches = start(tells=lambda descriptor: os.fstat(descriptor).st_dev != device)
        for snapshot in "12":
            capture(watches, snapshot)
            print(look(watches))
        watches.stop()
        """,
    )
    assert lines == [f"('{snapshot}', ['a', 'a/b', 'a/b/c'], ['.', 'e'])" for snapshot in "12"]


def test_a_directory_that_is_mounted_in_two_places_is_never_unchanged_in_both(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
        enter_mount_namespace()
        mount(None, tree / "a", tree / "e", BIND)
        watches = start()
        for snapshot in "123":
            capture(watches, snapshot)
            base, changed, unchanged = look(watches)
            print(base, bool({"a", "e"} & set(changed)), {"a", "e"} <= set(unchanged))
        watches.stop()
        """,
    )
    assert lines == [f"{snapshot} True False" for snapshot in "123"]
