"""Files that may change once more without a change of their times."""

import pytest

from replicated.snapshot import treecache
from replicated.snapshot.entries import Row, pack_rows, unpack_rows
from replicated.snapshot.treecache import RACY_NS, smudge

DAY_NS = 86_400 * 10**9
NOW_NS = 20_000 * DAY_NS


def row(mtime_ns: int, ctime_ns: int) -> Row:
    return Row(b"weights", 0o100644, 12, 5, mtime_ns, ctime_ns)


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "is_racy"),
    [
        (NOW_NS - RACY_NS - 1, NOW_NS - RACY_NS - 1, False),
        (NOW_NS - RACY_NS, NOW_NS - RACY_NS - 1, True),
        (NOW_NS - RACY_NS - 1, NOW_NS - RACY_NS, True),
        (NOW_NS - RACY_NS - 1, NOW_NS + DAY_NS, True),
        (0, 1, False),
    ],
)
def test_a_file_that_changed_just_before_it_was_listed_is_smudged(
    mtime_ns: int, ctime_ns: int, is_racy: bool
) -> None:
    old = row(1, 2)._replace(name=b"old")
    found = row(mtime_ns, ctime_ns)
    smudged = smudge([old, found], NOW_NS)
    assert (smudged != pack_rows([old, found])) == is_racy
    assert unpack_rows(smudged) == [old, found._replace(ctime_ns=0) if is_racy else found]


def test_rows_without_names_of_their_fields_are_smudged_as_well() -> None:
    found = row(NOW_NS, NOW_NS)
    assert smudge([tuple(found)], NOW_NS) == smudge([found], NOW_NS)


SECOND_NS = 10**9


@pytest.mark.parametrize(
    ("age_ns", "ctime_ns", "racy"),
    [
        (10_000_000, 1_234_567_891, True),
        (30_000_000, 1_234_567_891, False),
        # Whole seconds: the file system knows nothing finer.
        (30_000_000, 5 * SECOND_NS, True),
        (1_900_000_000, 5 * SECOND_NS, True),
        (2_200_000_000, 5 * SECOND_NS, False),
    ],
)
def test_files_are_racy_within_the_granularity_of_their_times(age_ns: int, ctime_ns: int, racy: bool) -> None:
    assert treecache.is_racy(ctime_ns, ctime_ns, ctime_ns + age_ns) is racy
    # A time that was set by somebody is no reason to doubt the other.
    assert treecache.is_racy(0, ctime_ns, ctime_ns + age_ns) is racy
