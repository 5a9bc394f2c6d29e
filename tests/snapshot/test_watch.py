"""What the watches tell of one change, of walks that overlap, and of trees that cannot be watched."""

import ctypes
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replicated.snapshot.watch import FULL_WALK_S, MAX_TREES, TreeWatches, WatchedWalk

KEY = b"key"
_libc = ctypes.CDLL(None, use_errno=True)
_MAX_QUEUED_EVENTS = Path("/proc/sys/fs/inotify/max_queued_events")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


Start = Callable[..., TreeWatches]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts watches, of trees of any size unless told otherwise."""
    started: list[TreeWatches] = []

    def start_one(**options: object) -> TreeWatches:
        watches = TreeWatches(**{"min_files": 0, **options})  # type: ignore[arg-type]
        watches.start()
        started.append(watches)
        return watches

    yield start_one
    for watches in started:
        watches.stop()


@pytest.fixture
def watches(start: Start) -> TreeWatches:
    return start()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with some directories and files."""
    root = tmp_path / "tree"
    for name in ("a/b/c", "a/d", "e"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)
    return root


def see(walk: WatchedWalk, root: Path) -> WatchedWalk:
    """Visit all directories of a tree."""
    for path, *_ in os.walk(os.fsencode(root)):
        if not walk.is_unchanged(path):
            walk.add(path)
    return walk


def capture(watches: TreeWatches, root: Path, snapshot: str, key: bytes = KEY) -> None:
    see(watches.begin(key), root).commit(snapshot)


def look(watches: TreeWatches, root: Path, key: bytes = KEY) -> tuple[str, set[str], set[str]]:
    """The base, what changed since, and which directories are unchanged, by relative path."""
    walk = watches.begin(key)
    changed = {os.path.relpath(os.fsdecode(path), root) for path in walk.changed}
    paths = [path for path, *_ in os.walk(os.fsencode(root))]
    unchanged = {os.path.relpath(os.fsdecode(path), root) for path in paths if walk.is_unchanged(path)}
    walk.abandon()
    return walk.base, changed, unchanged


def count_watches_of_the_kernel() -> int:
    """Watches of this process, as the kernel has them."""
    count = 0
    for path in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            count += path.read_text().count("inotify wd:")
    return count


EVERYTHING = {".", "a", "a/b", "a/b/c", "a/d", "e"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# One tree


def test_a_tree_that_was_never_walked_is_unknown(watches: TreeWatches, tree: Path) -> None:
    assert look(watches, tree) == ("", set(), set())


def test_nothing_has_changed_when_nothing_was_done(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    assert look(watches, tree) == ("1", set(), EVERYTHING)


def test_reading_a_tree_changes_nothing(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    for path in tree.rglob("*"):
        path.stat()
        if path.is_file():
            path.read_bytes()
    assert look(watches, tree) == ("1", set(), EVERYTHING)


def test_a_walk_that_visits_nothing_says_that_nothing_has_changed(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    watches.begin(KEY).commit("2")
    assert look(watches, tree) == ("2", set(), EVERYTHING)
    (tree / "e/file").write_text("new")
    assert look(watches, tree) == ("2", {"e"}, EVERYTHING - {"e"})


def test_a_walk_that_visits_nothing_though_something_changed_is_no_base(
    watches: TreeWatches, tree: Path
) -> None:
    watches.begin(KEY).commit("0")
    assert look(watches, tree)[0] == ""
    capture(watches, tree, "1")
    (tree / "e/file").write_text("new")
    watches.begin(KEY).commit("2")
    assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})


def test_changes_are_told_until_a_walk_has_seen_them(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    (tree / "e/file").write_text("new")
    for _ in range(2):
        assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})
    capture(watches, tree, "2")
    assert look(watches, tree) == ("2", set(), EVERYTHING)


def test_what_happens_during_a_walk_is_for_the_next_one(watches: TreeWatches, tree: Path) -> None:
    walk = see(watches.begin(KEY), tree)
    (tree / "e/file").write_text("new")
    walk.commit("1")
    assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})

    walk = watches.begin(KEY)
    (tree / "a/d/file").write_text("new")
    assert walk.is_unchanged(os.fsencode(tree / "a/d"))  # it was, when the walk began
    see(walk, tree).commit("2")
    assert look(watches, tree) == ("2", {"a/d"}, EVERYTHING - {"a/d"})


def test_a_walk_that_was_abandoned_leaves_everything_as_it_was(watches: TreeWatches, tree: Path) -> None:
    see(watches.begin(KEY), tree).abandon()
    assert look(watches, tree)[0] == ""
    capture(watches, tree, "1")
    (tree / "e/file").write_text("new")
    walk = see(watches.begin(KEY), tree)
    walk.abandon()
    walk.abandon()
    assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})


def test_a_commit_cannot_be_undone(watches: TreeWatches, tree: Path) -> None:
    walk = see(watches.begin(KEY), tree)
    walk.commit("1")
    walk.abandon()
    walk.commit("2")
    assert look(watches, tree) == ("1", set(), EVERYTHING)


def test_trees_that_overlap_are_each_told(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    capture(watches, tree / "a", "2", key=b"part")
    (tree / "a/d/file").write_text("new")
    assert look(watches, tree)[:2] == ("1", {"a/d"})
    assert look(watches, tree / "a", key=b"part")[:2] == ("2", {"d"})


# Ways to change something


def _copy_file_range(tree: Path) -> None:
    with (tree / "e/file").open("rb") as source, (tree / "a/d/file").open("r+b") as target:
        os.copy_file_range(source.fileno(), target.fileno(), 1)


def _send_file(tree: Path) -> None:
    with (tree / "e/file").open("rb") as source, (tree / "a/d/file").open("r+b") as target:
        os.sendfile(target.fileno(), source.fileno(), 0, 1)


def _splice(tree: Path) -> None:
    receive, send = os.pipe()
    try:
        os.write(send, b"new")
        with (tree / "a/d/file").open("r+b") as target:
            assert os.splice(receive, target.fileno(), 3) == 3
    finally:
        os.close(receive)
        os.close(send)


def _allocate(tree: Path) -> None:
    with (tree / "a/d/file").open("r+b") as target:
        os.posix_fallocate(target.fileno(), 0, 100_000)


def _write_into_the_middle(tree: Path) -> None:
    with (tree / "a/d/file").open("r+b") as target:
        os.pwritev(target.fileno(), [b"new"], 1)


def _write_nameless_file_and_link_it(tree: Path) -> None:
    descriptor = os.open(tree / "a/d", os.O_TMPFILE | os.O_RDWR)
    os.write(descriptor, b"new")
    # With a directory it is linkat(2), which can follow the link in /proc.
    os.link(f"/proc/self/fd/{descriptor}", tree / "a/d/linked", src_dir_fd=descriptor)
    os.close(descriptor)


def _make_fifo(tree: Path) -> None:
    os.mkfifo(tree / "a/d/fifo")


DEEDS: dict[str, Callable[[Path], object]] = {
    "create": lambda tree: (tree / "a/d/new").touch(),
    "write": lambda tree: (tree / "a/d/file").write_text("new"),
    "truncate": lambda tree: os.truncate(tree / "a/d/file", 1),
    "pwritev": _write_into_the_middle,
    "copy_file_range": _copy_file_range,
    "sendfile": _send_file,
    "splice": _splice,
    "fallocate": _allocate,
    "unlink": lambda tree: (tree / "a/d/file").unlink(),
    "link": lambda tree: os.link(tree / "a/d/file", tree / "a/d/linked"),
    "link a file without a name": _write_nameless_file_and_link_it,
    "symlink": lambda tree: (tree / "a/d/link").symlink_to("file"),
    "mkfifo": _make_fifo,
    "rename": lambda tree: (tree / "a/d/file").rename(tree / "a/d/renamed"),
    "chmod": lambda tree: (tree / "a/d/file").chmod(0o600),
    "utime": lambda tree: os.utime(tree / "a/d/file", ns=(1, 1)),
    "setxattr": lambda tree: os.setxattr(tree / "a/d/file", b"user.test", b"new"),
    "mkdir": lambda tree: (tree / "a/d/new").mkdir(),
    "utime of the directory": lambda tree: os.utime(tree / "a/d", ns=(1, 1)),
    "chmod of the directory": lambda tree: (tree / "a/d").chmod(0o700),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_directory_is_told_in_which_there_was_a(deed: str, watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    DEEDS[deed](tree)
    base, changed, unchanged = look(watches, tree)
    assert base == "1"
    # The directory that holds a directory hears of its mode and times as well.
    assert {"a/d"} <= changed <= ({"a/d", "a"} if "of the directory" in deed else {"a/d"})
    assert unchanged == EVERYTHING - changed


def test_writing_through_a_name_that_was_unlinked_is_told(watches: TreeWatches, tree: Path) -> None:
    with (tree / "e/new").open("wb") as file:
        os.link(tree / "e/new", tree / "e/finished")
        os.unlink(tree / "e/new")
        capture(watches, tree, "1")
        file.write(b"more")
        file.flush()
        assert look(watches, tree)[1] == {"e"}


def test_writing_through_a_descriptor_follows_the_file_to_another_directory(
    watches: TreeWatches, tree: Path
) -> None:
    with (tree / "e/file").open("ab") as file:
        (tree / "e/file").rename(tree / "a/moved")
        capture(watches, tree, "1")
        file.write(b"more")
        file.flush()
        assert look(watches, tree)[1] == {"a"}


# Directories that move


def test_a_new_directory_is_not_unchanged_and_watched_once_it_was_listed(
    watches: TreeWatches, tree: Path
) -> None:
    capture(watches, tree, "1")
    (tree / "e/new/deep").mkdir(parents=True)
    assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})
    capture(watches, tree, "2")
    (tree / "e/new/deep/file").write_text("new")
    assert look(watches, tree)[1] == {"e/new/deep"}


def test_a_directory_that_was_moved_is_known_under_no_name(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    (tree / "a").rename(tree / "e/a")
    base, changed, unchanged = look(watches, tree)
    assert base == "1"
    assert {".", "e", "a"} <= changed
    assert unchanged == set()
    capture(watches, tree, "2")
    (tree / "e/a/b/c/file").write_text("new")
    assert look(watches, tree)[1] == {"e/a/b/c"}


def test_a_directory_that_was_away_is_not_unchanged(watches: TreeWatches, tree: Path, tmp_path: Path) -> None:
    capture(watches, tree, "1")
    (tree / "a").rename(tmp_path / "away")
    capture(watches, tree, "2")
    (tmp_path / "away/b/file").write_text("while nobody looked")
    (tmp_path / "away").rename(tree / "a")
    assert look(watches, tree) == ("2", {"."}, {"e"})


def test_directories_that_changed_places_are_not_unchanged(watches: TreeWatches, tree: Path) -> None:
    (tree / "e/b/c").mkdir(parents=True)
    capture(watches, tree, "1")
    (tree / "a").rename(tree / "x")
    (tree / "e").rename(tree / "a")
    (tree / "x").rename(tree / "e")
    assert look(watches, tree)[2] == set()


def test_a_directory_in_place_of_another_is_not_unchanged(
    watches: TreeWatches, tree: Path, tmp_path: Path
) -> None:
    capture(watches, tree, "1")
    shutil.rmtree(tree / "a/b")
    (tree / "a/b/c").mkdir(parents=True)
    assert look(watches, tree)[2] == {".", "a/d", "e"}


def test_a_directory_in_place_of_one_that_is_still_open_is_not_taken_for_it(
    watches: TreeWatches, tree: Path
) -> None:
    capture(watches, tree, "1")
    # The kernel says that a directory itself is gone when nobody has it open any more.
    descriptor = os.open(tree / "a/b/c", os.O_RDONLY)
    try:
        shutil.rmtree(tree / "a/b")
        (tree / "a/b/c").mkdir(parents=True)
        assert look(watches, tree)[2] == {".", "a/d", "e"}
        capture(watches, tree, "2")
        (tree / "a/b/c/file").write_text("new")
        assert look(watches, tree)[1] == {"a/b/c"}
    finally:
        os.close(descriptor)
    capture(watches, tree, "3")
    (tree / "a/b/c/file").write_text("newer")
    assert look(watches, tree)[1] == {"a/b/c"}


def test_a_directory_behind_a_link_is_not_watched_in_its_place(
    watches: TreeWatches, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tree / "link").symlink_to(tmp_path / "outside")
    walk = see(watches.begin(KEY), tree)
    walk.add(os.fsencode(tree / "link"))
    walk.commit("1")
    (tmp_path / "outside/file").write_text("new")
    base, changed, unchanged = look(watches, tree)
    assert (base, changed) == ("1", {"link"})  # as it could not be watched
    assert unchanged == EVERYTHING


def test_directories_that_are_gone_are_watched_no_longer(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    assert watches.watch_count == 6
    shutil.rmtree(tree / "a")
    capture(watches, tree, "2")
    assert watches.watch_count == count_watches_of_the_kernel() == 2
    assert look(watches, tree) == ("2", set(), {".", "e"})


def test_directories_that_have_left_are_watched_no_longer(
    watches: TreeWatches, tree: Path, tmp_path: Path
) -> None:
    capture(watches, tree, "1")
    (tree / "a").rename(tmp_path / "away")
    watches.begin(KEY).abandon()
    assert watches.watch_count == count_watches_of_the_kernel() == 2


def test_directories_that_are_left_out_from_now_on_are_watched_no_longer(
    watches: TreeWatches, tree: Path
) -> None:
    capture(watches, tree, "1")
    walk = watches.begin(KEY)
    for name in ("", "/e"):
        walk.add(os.fsencode(tree) + name.encode())
    walk.commit("2")
    assert watches.watch_count == count_watches_of_the_kernel() == 2
    (tree / "a/b/file").write_text("new")
    capture(watches, tree, "3")
    assert look(watches, tree) == ("3", set(), EVERYTHING)


def test_a_root_that_was_moved_is_unknown(watches: TreeWatches, tree: Path, tmp_path: Path) -> None:
    capture(watches, tree, "1")
    tree.rename(tmp_path / "away")
    (tmp_path / "away/file").write_text("new")
    (tmp_path / "away").rename(tree)
    assert look(watches, tree)[0] == ""
    capture(watches, tree, "2")
    assert look(watches, tree) == ("2", set(), EVERYTHING)


def test_a_root_that_was_removed_is_unknown(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    shutil.rmtree(tree)
    assert look(watches, tree)[0] == ""
    assert watches.watch_count == 0


# Directories that cannot be watched


def test_a_directory_with_a_file_of_several_names_is_listed_every_time(
    watches: TreeWatches, tree: Path
) -> None:
    def capture_doubting(snapshot: str) -> None:
        walk = see(watches.begin(KEY), tree)
        walk.doubt(os.fsencode(tree / "e"))
        walk.commit(snapshot)

    capture_doubting("1")
    assert look(watches, tree) == ("1", {"e"}, EVERYTHING - {"e"})
    capture_doubting("2")
    assert look(watches, tree) == ("2", {"e"}, EVERYTHING - {"e"})
    capture(watches, tree, "3")
    assert look(watches, tree) == ("3", set(), EVERYTHING)


def test_a_directory_that_could_not_be_watched_is_listed_next_time_with_all_below(
    watches: TreeWatches, tree: Path
) -> None:
    walk = see(watches.begin(KEY), tree)
    walk.add(os.fsencode(tree / "e/gone"))
    (tree / "e/gone/below").mkdir(parents=True)
    walk.add(os.fsencode(tree / "e/gone/below"))
    walk.commit("1")
    _, changed, unchanged = look(watches, tree)
    assert changed == {"e", "e/gone", "e/gone/below"}
    assert unchanged == EVERYTHING - {"e"}


def test_a_directory_with_too_long_a_path_is_listed_every_time(watches: TreeWatches, tree: Path) -> None:
    name = "n" * 250
    descriptor = os.open(tree / "e", os.O_RDONLY)
    paths = [os.fsencode(tree / "e")]
    while len(paths[-1]) < 4096:
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
        paths.append(paths[-1] + b"/" + name.encode())
    os.close(descriptor)
    try:
        walk = see(watches.begin(KEY), tree)
        for path in paths:
            walk.add(path)
        walk.commit("1")
        walk = watches.begin(KEY)
        assert walk.changed == {paths[-1]}
        assert [walk.is_unchanged(path) for path in paths] == [True] * (len(paths) - 1) + [False]
    finally:
        shutil.rmtree(tree / "e")


# Walks that overlap


@pytest.mark.parametrize("order", ["the first ends first", "the second ends first"])
@pytest.mark.parametrize("failed", ["none fails", "the first fails", "the second fails"])
@pytest.mark.parametrize("is_first_capture", [True, False])
def test_walks_that_overlap_lose_no_change(
    watches: TreeWatches, tree: Path, order: str, failed: str, is_first_capture: bool
) -> None:
    if not is_first_capture:
        capture(watches, tree, "0")
        (tree / "file").write_text("before both")
    first = see(watches.begin(KEY), tree)
    (tree / "a/file").write_text("seen by the second")
    second = see(watches.begin(KEY), tree)
    (tree / "e/file").write_text("seen by none")
    walks = [(first, "1", failed == "the first fails"), (second, "2", failed == "the second fails")]
    for walk, snapshot, is_failed in walks if order == "the first ends first" else reversed(walks):
        walk.abandon() if is_failed else walk.commit(snapshot)
    base, changed, unchanged = look(watches, tree)
    if failed == "the second fails":
        assert (base, changed) == ("1", {"a", "e"})
    else:
        assert (base, changed) == ("2", {"e"})
    assert unchanged == EVERYTHING - changed


def test_a_directory_that_the_base_did_not_visit_is_not_unchanged(watches: TreeWatches, tree: Path) -> None:
    first = see(watches.begin(KEY), tree)
    second = watches.begin(KEY)
    second.add(os.fsencode(tree))
    second.commit("2")
    (tree / "a/b/file").write_text("new")
    assert look(watches, tree)[2] == {"."}
    first.abandon()
    assert look(watches, tree)[2] == {"."}


# Trouble


def overflow(watches: TreeWatches, tree: Path) -> None:
    """Queue more than the queue holds, while nobody reads it."""
    files = [tree / "one", tree / "other"]
    for file in files:
        file.touch()
    with watches._lock:
        for number in range(int(_MAX_QUEUED_EVENTS.read_text()) + 1):
            os.utime(files[number % 2])


def test_a_tree_is_unknown_after_more_than_the_queue_holds(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1")
    overflow(watches, tree)
    assert look(watches, tree) == ("", set(), set())
    capture(watches, tree, "2")
    assert look(watches, tree) == ("2", set(), EVERYTHING)
    (tree / "e/file").write_text("new")
    assert look(watches, tree) == ("2", {"e"}, EVERYTHING - {"e"})


def test_a_walk_during_which_events_were_lost_is_no_base(watches: TreeWatches, tree: Path) -> None:
    walk = see(watches.begin(KEY), tree)
    overflow(watches, tree)
    walk.commit("1")
    assert look(watches, tree)[0] == ""
    capture(watches, tree, "2")
    walk = see(watches.begin(KEY), tree)
    overflow(watches, tree)
    walk.commit("3")
    assert look(watches, tree)[0] == ""


def test_everything_is_walked_again_after_ten_minutes(start: Start, tree: Path) -> None:
    clock = Clock()
    watches = start(clock=clock)
    capture(watches, tree, "1")
    clock.now_s += FULL_WALK_S - 1
    capture(watches, tree, "2")
    assert look(watches, tree)[0] == "2"
    during = see(watches.begin(KEY), tree)
    clock.now_s += 1
    assert look(watches, tree)[0] == ""
    during.commit("3")
    assert look(watches, tree)[0] == ""
    capture(watches, tree, "4")
    clock.now_s += FULL_WALK_S - 1
    assert look(watches, tree) == ("4", set(), EVERYTHING)


def test_a_tree_of_few_files_is_not_watched_until_it_has_grown(start: Start, tree: Path) -> None:
    watches = start(min_files=2000)
    see(watches.begin(KEY), tree).commit("1", 1999)
    assert watches.watch_count == 0
    see(watches.begin(KEY), tree).commit("2", 1999)
    assert look(watches, tree)[0] == ""
    see(watches.begin(KEY), tree).commit("3", 2000)
    assert watches.watch_count == 0
    see(watches.begin(KEY), tree).commit("4", 2000)
    assert look(watches, tree) == ("4", set(), EVERYTHING)
    watches.begin(KEY).commit("5", 2000)
    assert look(watches, tree) == ("5", set(), EVERYTHING)
    see(watches.begin(KEY), tree).commit("6", 5)
    assert look(watches, tree)[0] == ""


def test_a_tree_without_key_is_not_watched(watches: TreeWatches, tree: Path) -> None:
    capture(watches, tree, "1", key=b"")
    assert watches.watch_count == 0
    assert look(watches, tree, key=b"")[0] == ""


def test_nothing_is_watched_before_the_start_and_after_the_stop(tree: Path) -> None:
    watches = TreeWatches(min_files=0)
    capture(watches, tree, "1")
    assert look(watches, tree)[0] == ""
    watches.start()
    capture(watches, tree, "2")
    late = see(watches.begin(KEY), tree)
    watches.stop()
    watches.stop()
    late.add(os.fsencode(tree / "e/new"))
    late.commit("3", 100)
    capture(watches, tree, "4")
    assert look(watches, tree)[0] == ""
    assert watches.watch_count == 0


def test_a_tree_with_too_many_directories_is_not_watched_and_not_tried_again_for_a_while(
    start: Start, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    watches = start(max_watches=5, clock=clock)
    for _ in range(3):
        capture(watches, tree, "1")
        assert watches.watch_count == 0
        assert look(watches, tree)[0] == ""
    (text,) = warnings(caplog)
    assert text == f"changes below {tree} are not watched: fs.inotify.max_user_watches is too low for it"
    shutil.rmtree(tree / "e")
    clock.now_s += FULL_WALK_S
    capture(watches, tree, "2")
    assert look(watches, tree) == ("2", set(), EVERYTHING - {"e"})


def test_the_trees_that_were_used_last_are_watched(watches: TreeWatches, tree: Path) -> None:
    keys = [b"%d" % number for number in range(MAX_TREES + 2)]
    for key in keys:
        capture(watches, tree, "1", key=key)
    assert [look(watches, tree, key=key)[0] for key in reversed(keys)] == ["1"] * MAX_TREES + [""] * 2


def test_a_tree_that_is_being_walked_does_not_lose_its_watches_to_another(
    watches: TreeWatches, tree: Path
) -> None:
    walks = [see(watches.begin(b"%d" % number), tree) for number in range(MAX_TREES)]
    capture(watches, tree, "1", key=b"another")
    assert look(watches, tree, key=b"another")[0] == ""
    for walk in walks:
        walk.commit("1")
    assert look(watches, tree, key=b"0") == ("1", set(), EVERYTHING)


def test_a_tree_on_a_file_system_that_does_not_tell_is_not_watched(start: Start, tree: Path) -> None:
    asked: list[int] = []

    def tells(descriptor: int) -> bool:
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        asked.append(os.fstat(descriptor).st_ino)
        return False

    watches = start(tells=tells)
    for _ in range(3):
        capture(watches, tree, "1")
        assert watches.watch_count == 0
    assert asked == [tree.stat().st_ino]
