"""What a walk selects, and how it tells what the base of a watched tree is good for."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import CaptureFailed, PathMissing
from replicated.snapshot.entries import Row
from replicated.snapshot.selection import Omissions, Selection
from replicated.snapshot.treecache import RACY_NS, smudge
from replicated.snapshot.unchanged import _has_smudged

NOW_NS = 1_790_000_000_000_000_000
ROWS = st.builds(
    Row,
    st.binary(min_size=1, max_size=255),
    st.sampled_from([0o100644, 0o120777]),
    st.integers(1, 2**64 - 1),
    st.integers(0, 2**40),
    st.integers(0, NOW_NS - RACY_NS - 1) | st.integers(-(2**62), 2**66),
    st.integers(10**18, NOW_NS - RACY_NS - 1) | st.just(NOW_NS),
)


@given(st.lists(ROWS, max_size=5))
def test_smudged_rows_are_seen_in_their_packed_form(rows):
    packed = smudge(rows, NOW_NS)
    if any(max(row.mtime_ns, row.ctime_ns) >= NOW_NS - RACY_NS for row in rows):
        assert _has_smudged(packed)


@given(st.lists(st.integers(10**18, NOW_NS - RACY_NS - 1), max_size=50))
def test_rows_that_are_not_smudged_are_not_taken_for_it(times):
    rows = [Row(b"file-%d" % time, 0o100644, time % 10**7, time % 10**5, time, time) for time in times]
    assert not _has_smudged(smudge(rows, NOW_NS))


def test_a_selection_is_the_union_of_its_paths():
    selection = Selection.of([b"a/b", b"./a//c", b"d", b"d/e"])
    assert not selection.everything
    assert set(selection.children) == {b"a", b"d"}
    assert set(selection.below(b"a").children) == {b"b", b"c"}
    assert selection.below(b"d").everything
    assert selection.below(b"d").below(b"any").everything
    assert not selection.below(b"other").everything
    assert Selection.of([b"."]).is_whole
    assert not Selection.of([b".", b"a"]).is_whole
    assert Selection.of([b".", b"a/b"]).below(b"a").everything
    with pytest.raises(PathMissing, match=re.escape("outside the project directory: a/../..")):
        Selection.of([b"a/../.."])


def test_omissions_are_counted_and_the_first_named():
    omissions = Omissions()
    for name in [b"d/.env", b"c", b"b", b"a"]:
        omissions.add_secret(name)
    omissions.add_mount(b"mnt")
    secrets, mounts = omissions.warnings()
    assert secrets.startswith("skipped 4 files that may hold secrets: a, b, c, … (write `!NAME`")
    assert mounts == "skipped 1 mount of a snapshot: mnt"
    assert omissions.directories == {b"", b"d"}


@pytest.mark.parametrize("name", ["sub", "sub/file"])
def test_what_cannot_be_read_is_named(captures, project, monkeypatch, name):
    (project / "sub").mkdir()
    (project / "sub/file").touch()
    real_open = os.open

    def open_(path, *arguments, **options):
        if path == os.path.basename(name).encode():
            raise PermissionError(13, "Permission denied")
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(CaptureFailed, match=f"cannot read {name}: Permission denied") as raised:
        captures.capture(project)
    assert raised.value.fields == {"path": name, "errno": "EACCES"}


def test_no_descriptor_is_left_open(captures, project, monkeypatch):
    for name in ["a/b/c", "a/d", "e/f"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"x")
    captures.capture(project)
    captures.capturer.finish("a" * 64)
    before = len(os.listdir("/proc/self/fd"))
    captures.capture(project, identifier="2" * 64)
    with pytest.raises(PathMissing):
        captures.capture(project, "a", "e/none", identifier="3" * 64)
    captures.capturer.finish("2" * 64)
    assert len(os.listdir("/proc/self/fd")) == before
