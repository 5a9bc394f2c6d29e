"""What captures have that is not stored yet."""

from replicated.snapshot.entries import HELD, KNOWN, PACKED, SPOOLED, pack_rows, pack_sources
from replicated.snapshot.pending import Pending, PendingDirectory
from replicated.snapshot.treecache import RACY_NS

LISTED_NS = 10**18
OLD_NS = LISTED_NS - RACY_NS - 1


def row(name, size=1, mtime_ns=OLD_NS, ctime_ns=OLD_NS):
    return (name, 0o100644, 7, size, mtime_ns, ctime_ns)


def directory(*files, path=b"/p", device=1):
    rows = pack_rows([row for row, _ in files])
    return PendingDirectory(path, device, LISTED_NS, rows, pack_sources([source for _, source in files]))


def test_files_in_a_spool_are_found_by_their_stat():
    pending = Pending()
    packed, large = (PACKED, 64, "packed"), (SPOOLED, "large-0")
    pending.add("one", [directory((row(b"a"), packed), (row(b"b"), large))])
    files = pending.find(b"/p", 1)
    assert files.find(row(b"a")) == ("one", packed)
    assert files.find(row(b"b")) == ("one", large)
    assert files.find(row(b"b", size=2)) is None
    assert files.find(row(b"c")) is None
    assert pending.find(b"/q", 1) is None
    assert pending.find(b"/p", 2) is None


def test_held_known_and_racy_files_are_not_found():
    pending = Pending()
    racy = [row(b"c", mtime_ns=OLD_NS + 1), row(b"d", ctime_ns=LISTED_NS)]
    pending.add(
        "one",
        [
            directory(
                (row(b"a"), (HELD, 0)),
                (row(b"b"), (KNOWN, b"h", [])),
                *((one, (PACKED, 0, "packed")) for one in racy),
            )
        ],
    )
    files = pending.find(b"/p", 1)
    assert [files.find(one) for one in (row(b"a"), row(b"b"), *racy)] == [None] * 4


def test_the_newest_capture_comes_first_and_forgotten_ones_not_at_all():
    pending = Pending()
    for name in ["one", "two"]:
        pending.add(name, [directory((row(b"a"), (SPOOLED, name)))])
    assert pending.find(b"/p", 1).find(row(b"a")) == ("two", (SPOOLED, "two"))
    pending.forget("two")
    assert pending.find(b"/p", 1).find(row(b"a")) == ("one", (SPOOLED, "one"))
    pending.forget("one")
    pending.forget("one")
    assert pending.find(b"/p", 1) is None


def test_only_the_last_captures_of_a_directory_are_kept():
    pending = Pending()
    for number in range(10):
        pending.add(str(number), [directory((row(b"%d" % number), (SPOOLED, "large-0")))])
    files = pending.find(b"/p", 1)
    assert [number for number in range(10) if files.find(row(b"%d" % number))] == [6, 7, 8, 9]
    for number in range(10):
        pending.forget(str(number))
    assert pending.find(b"/p", 1) is None
