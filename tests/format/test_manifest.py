"""Nodes of trees: built, parsed, and refused when nobody could have built them."""

import os
import random
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from replicated.chunk.containers.source import MAX_REGIONS
from replicated.format.builders import ContentBuilder, DirectoryBuilder
from replicated.format.canonical import Malformed, pack
from replicated.format.manifest import (
    CHUNK_LIST_NODE,
    DIRECTORY,
    DIRECTORY_NODE,
    EMPTY_HASH,
    FILE,
    LAYOUT_NODE,
    MAX_INLINE_CHUNKS,
    MAX_NODE_BYTES,
    SYMLINK,
    ChunkList,
    Entry,
    FileContent,
    parse_chunk_list,
    parse_directory,
    parse_layout,
)

HASH = blake3(b"content").digest()

# Ids of two directories that are built below.
DIRECTORY_GOLDEN = "48666c649a69a6419826b6be23dc5cceb28859e4430799c65df8035f79a835f2"
GATHERED_GOLDEN = "446821cabfa228c0754b85eac5492933f4017624be4f0d562152a4537d29eff5"
LONG_DIRECTORY_GOLDEN = "a59e99c933b74b639ce4b102e85f750f309487bf661f4e541d2d19cf61e9be61"

FILE_ENTRY = (b"name", FILE, 0o644, 1_700_000_000, 123_456_789, 7, HASH, ())
LINK_ENTRY = (b"link", SYMLINK, 0o777, 0, 0, 3, blake3(b"a/b").digest(), (b"a/b",))
DIRECTORY_ENTRY = (b"dir", DIRECTORY, 0o755, -1, 999_999_999, 0, HASH, ())

names = st.binary(min_size=1, max_size=20).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)


class Nodes(dict[bytes, bytes]):
    """Nodes by id."""

    def store(self, data: bytes) -> bytes:
        node_id = blake3(data).digest()
        self[node_id] = data
        return node_id

    def entries(self, node_id: bytes) -> list[Entry]:
        node = parse_directory(self[node_id])
        return [*node.entries, *(e for child in node.children for e in self.entries(child.node))]

    def chunks(self, node_id: bytes) -> list[tuple[bytes, int]]:
        node = parse_chunk_list(self[node_id])
        if node.level == 0:
            return list(zip(node.split_ids(), node.lengths, strict=True))
        return [chunk for child in node.split_ids() for chunk in self.chunks(child)]


def directory(*entries: Any, level: int = 0) -> bytes:
    return pack([DIRECTORY_NODE, level, list(entries)])


def content_of(size: int) -> FileContent:
    return FileContent(size, HASH if size else EMPTY_HASH)


# Building and parsing


@given(st.dictionaries(names, st.integers(-(2**70), 2**70), max_size=30))
def test_parsed_directory_is_what_was_built(times: dict[bytes, int]) -> None:
    nodes = Nodes()
    builder = DirectoryBuilder(nodes.store)
    for position, (name, mtime_ns) in enumerate(sorted(times.items())):
        if position % 3 == 0:
            builder.add_file(name, 0o4755, mtime_ns, content_of(position))
        elif position % 3 == 1:
            builder.add_symlink(name, 0o777, mtime_ns, name + b"/..")
        else:
            builder.add_directory(name, 0o1777, mtime_ns, HASH)
    entries = nodes.entries(builder.finish())
    assert [(entry.name, entry.mtime_ns) for entry in entries] == sorted(times.items())
    assert [entry.type for entry in entries] == [(FILE, SYMLINK, DIRECTORY)[n % 3] for n in range(len(times))]
    assert all(entry.content == (entry.name + b"/..",) for entry in entries if entry.type == SYMLINK)


def test_encoding_of_a_directory_never_changes() -> None:
    """Another encoding would store every directory anew."""
    nodes = Nodes()
    builder = DirectoryBuilder(nodes.store)
    builder.add_directory(b"dir", 0o755, -1, HASH)
    builder.add_file(b"few", 0o600, 1_700_000_000_000_000_001, FileContent(9, HASH, HASH + HASH, (4, 5)))
    builder.add_symlink(b"link", 0o777, 0, b"a/b")
    builder.add_file(b"many", 0o644, 2**62, FileContent(10**10, HASH, node=HASH))
    builder.add_file(b"name", 0o644, 1_700_000_000_123_456_789, FileContent(7, HASH))
    assert builder.finish().hex() == DIRECTORY_GOLDEN


def test_encoding_of_gathered_files_never_changes() -> None:
    nodes = Nodes()
    builder = DirectoryBuilder(nodes.store)
    for name, chunk_count in ((b"few", 2), (b"many", 17)):
        content = ContentBuilder(nodes.store)
        for _ in range(chunk_count):
            content.add(HASH, 1000)
        builder.add_file(name, 0o644, 0, content.finish(HASH, (100, 300, 7, chunk_count * 1000 - 407)))
    assert builder.finish().hex() == GATHERED_GOLDEN


def test_encoding_of_a_long_directory_never_changes() -> None:
    assert build_long_directory(20_000)[0].hex() == LONG_DIRECTORY_GOLDEN


def build_long_directory(count: int, touched: int = -1, extra: bytes = b"") -> tuple[bytes, Nodes]:
    nodes = Nodes()
    builder = DirectoryBuilder(nodes.store)
    for name in sorted([*(b"%07d" % number for number in range(count)), *([extra] if extra else [])]):
        builder.add_file(name, 0o644, int(name == b"%07d" % touched), content_of(1))
    return builder.finish(), nodes


def test_one_change_in_a_long_directory_writes_few_small_nodes() -> None:
    root, nodes = build_long_directory(100_000)
    assert len(nodes.entries(root)) == 100_000
    for change in ({"touched": 50_000}, {"extra": b"0050000a"}):
        changed_root, changed = build_long_directory(100_000, **change)
        new = changed.keys() - nodes.keys()
        assert changed_root in new
        assert len(new) <= 4
        assert sum(len(changed[node]) for node in new) < 200_000


@given(st.integers(0, 3000), st.integers(1, 5))
@settings(max_examples=25)
def test_parsed_chunks_are_what_was_added(count: int, variety: int) -> None:
    nodes = Nodes()
    builder = ContentBuilder(nodes.store)
    chunks = [(blake3(bytes([n % variety])).digest(), 1 + n % variety) for n in range(count)]
    for chunk in chunks:
        builder.add(*chunk)
    digest = chunks[0][0] if count == 1 else HASH if count else EMPTY_HASH
    content = builder.finish(digest)
    assert content.size == sum(length for _, length in chunks)
    assert FileContent.decode(content.encode()) == content
    if count <= 1:
        assert content.ids() == [chunk_id for chunk_id, _ in chunks]
    elif count <= MAX_INLINE_CHUNKS:
        assert list(zip(content.ids(), content.lengths, strict=True)) == chunks
    else:
        assert nodes.chunks(content.node) == chunks


@given(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(1, 99), min_size=1, max_size=20))
def test_gathered_content_has_its_layout_and_all_its_chunks(
    count: int, first: int, others: list[int]
) -> None:
    lengths = (first, *others) if first or len(others) > 1 else (1, *others)
    nodes = Nodes()
    builder = ContentBuilder(nodes.store)
    chunks = [(blake3(bytes([n])).digest(), sum(lengths) // count) for n in range(count)]
    chunks[-1] = (chunks[-1][0], sum(lengths) - sum(length for _, length in chunks[:-1]))
    chunks = [chunk for chunk in chunks if chunk[1]]
    for chunk in chunks:
        builder.add(*chunk)
    content = builder.finish(HASH, lengths)
    assert (content.size, content.hash) == (sum(lengths), HASH)
    assert parse_layout(nodes[content.layout]) == lengths
    assert FileContent.decode(content.encode()) == content
    assert content.layout in content.named_ids()
    if len(chunks) <= MAX_INLINE_CHUNKS:
        assert list(zip(content.ids(), content.lengths, strict=True)) == chunks
        assert content.named_ids() == [*content.ids(), content.layout]
    else:
        assert nodes.chunks(content.node) == chunks
        assert content.named_ids() == [content.node, content.layout]


@pytest.mark.parametrize("layout", [(0, 10), (1, 8), (2, 9), (0, 0, 10), (10,), (-1, 11), (5, 5.0)])
def test_layout_that_does_not_fit_is_a_mistake_of_the_caller(layout: tuple[int, ...]) -> None:
    nodes = Nodes()
    builder = ContentBuilder(nodes.store)
    builder.add(HASH, 10)
    with pytest.raises(ValueError, match="layout"):
        builder.finish(HASH, layout)
    assert nodes == {}


def test_slightly_changed_file_of_many_chunks_writes_few_nodes() -> None:
    chosen = random.Random(5)
    chunks = [(chosen.randbytes(32), 300_000) for _ in range(70_000)]

    def build(items: list[tuple[bytes, int]]) -> Nodes:
        nodes = Nodes()
        builder = ContentBuilder(nodes.store)
        for chunk in items:
            builder.add(*chunk)
        builder.finish(HASH)
        return nodes

    before = build(chunks)
    after = build([*chunks[:30_000], (b"\x01" * 32, 5), (b"\x02" * 32, 6), *chunks[30_001:]])
    assert len(after.keys() - before.keys()) <= 4


def test_names_out_of_order_are_a_mistake_of_the_caller() -> None:
    for second in (b"a", b"b"):
        builder = DirectoryBuilder(Nodes().store)
        builder.add_file(b"b", 0o644, 0, content_of(1))
        with pytest.raises(ValueError, match="not in order"):
            builder.add_file(second, 0o644, 0, content_of(1))


@pytest.mark.parametrize("name", [b".", b"..", b"a/b", b"a\0", b"x" * 1025])
def test_names_that_no_file_has_cannot_be_added(name: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        DirectoryBuilder(Nodes().store).add_file(name, 0o644, 0, content_of(1))


# Refusing


@pytest.mark.parametrize("entry", [FILE_ENTRY, LINK_ENTRY, DIRECTORY_ENTRY])
def test_good_entries_are_accepted(entry: tuple[Any, ...]) -> None:
    assert parse_directory(directory(entry)).entries == (entry,)


def changed(entry: tuple[Any, ...], **members: Any) -> tuple[Any, ...]:
    return tuple(Entry._make(entry)._replace(**members))


BAD_ENTRIES = {
    "not an array": 1,
    "too short": FILE_ENTRY[:7],
    "too long": (*FILE_ENTRY, 0),
    "empty name": changed(FILE_ENTRY, name=b""),
    "dot": changed(FILE_ENTRY, name=b"."),
    "dot dot": changed(FILE_ENTRY, name=b".."),
    "slash": changed(FILE_ENTRY, name=b"../etc/passwd"),
    "absolute": changed(FILE_ENTRY, name=b"/etc"),
    "zero byte": changed(FILE_ENTRY, name=b"a\0b"),
    "long name": changed(FILE_ENTRY, name=b"x" * 1025),
    "text name": changed(FILE_ENTRY, name="name"),
    "unknown type": changed(FILE_ENTRY, type=3),
    "boolean type": changed(FILE_ENTRY, type=False),
    "float mode": changed(FILE_ENTRY, mode=1.0),
    "negative mode": changed(FILE_ENTRY, mode=-1),
    "mode of a device": changed(FILE_ENTRY, mode=0o20644),
    "huge time": changed(FILE_ENTRY, seconds=2**63),
    "negative nanoseconds": changed(FILE_ENTRY, nanoseconds=-1),
    "many nanoseconds": changed(FILE_ENTRY, nanoseconds=10**9),
    "negative size": changed(FILE_ENTRY, size=-1),
    "huge size": changed(FILE_ENTRY, size=2**63),
    "chunk too large": changed(FILE_ENTRY, size=(16 << 20) + 1),
    "short hash": changed(FILE_ENTRY, hash=HASH[:31]),
    "no hash": changed(FILE_ENTRY, hash=None),
    "empty file with another hash": changed(FILE_ENTRY, size=0),
    "no content": changed(FILE_ENTRY, content=None),
    "short node": changed(FILE_ENTRY, content=(HASH[:31],)),
    "node of nothing": changed(FILE_ENTRY, size=0, hash=EMPTY_HASH, content=(HASH,)),
    "lengths that do not add up": changed(FILE_ENTRY, content=(HASH * 2, (3, 5))),
    "one chunk in a list": changed(FILE_ENTRY, content=(HASH, (7,))),
    "ids without lengths": changed(FILE_ENTRY, content=(HASH * 2, (7,))),
    "empty list": changed(FILE_ENTRY, size=0, hash=EMPTY_HASH, content=(b"", ())),
    "empty chunk": changed(FILE_ENTRY, content=(HASH * 2, (7, 0))),
    "negative chunk": changed(FILE_ENTRY, content=(HASH * 2, (8, -1))),
    "too many inline": changed(FILE_ENTRY, size=17, content=(HASH * 17, (1,) * 17)),
    "three members": changed(FILE_ENTRY, content=(HASH, HASH, HASH)),
    "four members": changed(FILE_ENTRY, content=(HASH * 2, (3, 4), HASH, HASH)),
    "short layout": changed(FILE_ENTRY, content=(HASH, HASH[:31])),
    "layout without id": changed(FILE_ENTRY, content=(HASH * 2, (3, 4), b"")),
    "layout that is a number": changed(FILE_ENTRY, content=(HASH, 7)),
    "layout in front": changed(FILE_ENTRY, content=(HASH, HASH * 2, (3, 4))),
    "layout of nothing": changed(FILE_ENTRY, size=0, hash=EMPTY_HASH, content=(HASH, HASH)),
    "gathered lengths that do not add up": changed(FILE_ENTRY, content=(HASH, (6,), HASH)),
    "too many inline, gathered": changed(FILE_ENTRY, size=17, content=(HASH * 17, (1,) * 17, HASH)),
    "directory with a size": changed(DIRECTORY_ENTRY, size=1),
    "directory with content": changed(DIRECTORY_ENTRY, content=(HASH,)),
    "directory without node": changed(DIRECTORY_ENTRY, hash=b""),
    "link without target": changed(LINK_ENTRY, content=()),
    "empty target": changed(LINK_ENTRY, size=0, content=(b"",), hash=EMPTY_HASH),
    "zero byte in the target": changed(LINK_ENTRY, content=(b"a\0b",), hash=blake3(b"a\0b").digest()),
    "text target": changed(LINK_ENTRY, content=("a/b",)),
    "another target": changed(LINK_ENTRY, content=(b"a/c",)),
    "another target's length": changed(LINK_ENTRY, size=4),
    "long target": changed(
        LINK_ENTRY, size=4097, content=(b"x" * 4097,), hash=blake3(b"x" * 4097).digest()
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_bad_entry_is_refused(what: str) -> None:
    with pytest.raises(Malformed):
        parse_directory(directory(BAD_ENTRIES[what]))


@pytest.mark.parametrize(
    "data",
    [
        pack(1),
        pack([]),
        pack([DIRECTORY_NODE, 0]),
        pack([DIRECTORY_NODE, 0, [], []]),
        pack([DIRECTORY_NODE, 0, 7]),
        pack([DIRECTORY_NODE, -1, []]),
        pack([DIRECTORY_NODE, 9, []]),
        pack([DIRECTORY_NODE, True, []]),
        pack([CHUNK_LIST_NODE, 0, []]),
        pack([3, 0, []]),
        directory(level=1),
        directory(FILE_ENTRY, FILE_ENTRY),
        directory(FILE_ENTRY, DIRECTORY_ENTRY),
        directory(FILE_ENTRY, level=1),
        directory((b"b", HASH, 1), (b"a", HASH, 1), level=1),
        directory((b"a", HASH, 1), (b"a", HASH, 1), level=1),
        directory((b"a", HASH, 0), level=1),
        directory((b"", HASH, 1), level=1),
        directory((b"a", HASH[:3], 1), level=1),
        directory((b"a", HASH), level=1),
        directory() + b"\0",
        b"\xdc\x00\x03" + directory()[1:],
        directory((b"x" * 1000, FILE, 0, 0, 0, 1, HASH, ())) + bytes(MAX_NODE_BYTES),
    ],
)
def test_bad_directory_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_directory(data)


@pytest.mark.parametrize(
    "data",
    [
        pack([CHUNK_LIST_NODE, 0, b"", []]),
        pack([CHUNK_LIST_NODE, 0, HASH, [0]]),
        pack([CHUNK_LIST_NODE, 0, HASH, [-5]]),
        pack([CHUNK_LIST_NODE, 0, HASH, [(16 << 20) + 1]]),
        pack([CHUNK_LIST_NODE, 1, HASH, [2**63]]),
        pack([CHUNK_LIST_NODE, 0, HASH, [1, 1]]),
        pack([CHUNK_LIST_NODE, 0, HASH * 2, [1]]),
        pack([CHUNK_LIST_NODE, 0, HASH[:-1], [1]]),
        pack([CHUNK_LIST_NODE, 0, [HASH], [1]]),
        pack([CHUNK_LIST_NODE, 0, HASH, [1.0]]),
        pack([DIRECTORY_NODE, 0, HASH, [1]]),
        directory(),
    ],
)
def test_bad_chunk_list_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_chunk_list(data)


@pytest.mark.parametrize("content", [(HASH, (7,), HASH), (HASH * 2, (3, 4), HASH), (HASH, HASH)])
def test_gathered_files_are_accepted(content: tuple[Any, ...]) -> None:
    (entry,) = parse_directory(directory(changed(FILE_ENTRY, content=content))).entries
    found = FileContent.from_entry(entry.size, entry.hash, entry.content)
    assert found.layout == HASH
    assert found.packed() == content


@pytest.mark.parametrize("lengths", [(1, 1), (0, 1, 1), (5, 4, 3, 2, 2**62), (1,) * (2 * MAX_REGIONS + 1)])
def test_good_layouts_are_accepted(lengths: tuple[int, ...]) -> None:
    assert parse_layout(pack([LAYOUT_NODE, lengths])) == lengths


@pytest.mark.parametrize(
    "data",
    [
        pack([LAYOUT_NODE, []]),
        pack([LAYOUT_NODE, [0]]),
        pack([LAYOUT_NODE, [5]]),
        pack([LAYOUT_NODE, [0, 5]]),
        pack([LAYOUT_NODE, [5, 0]]),
        pack([LAYOUT_NODE, [5, 5, 0]]),
        pack([LAYOUT_NODE, [0, 5, 0, 5]]),
        pack([LAYOUT_NODE, [-1, 5, 5]]),
        pack([LAYOUT_NODE, [5, -5]]),
        pack([LAYOUT_NODE, [5, 2**63]]),
        pack([LAYOUT_NODE, [2**63, 5]]),
        pack([LAYOUT_NODE, [5, 5.0]]),
        pack([LAYOUT_NODE, [True, 5]]),
        pack([LAYOUT_NODE, [5, HASH]]),
        pack([LAYOUT_NODE, HASH]),
        pack([LAYOUT_NODE, [1] * (2 * MAX_REGIONS + 2)]),
        pack([LAYOUT_NODE]),
        pack([LAYOUT_NODE, 0, [5, 5]]),
        pack([CHUNK_LIST_NODE, [5, 5]]),
        pack([True, [5, 5]]),
        pack(LAYOUT_NODE),
        pack([LAYOUT_NODE, [5, 5]]) + b"\0",
        pack([LAYOUT_NODE, [5, b"x" * MAX_NODE_BYTES]]),
    ],
)
def test_bad_layout_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse_layout(data)


def test_good_chunk_lists_are_accepted() -> None:
    assert parse_chunk_list(pack([CHUNK_LIST_NODE, 0, HASH, [5]])) == ChunkList(0, HASH, (5,))
    assert parse_chunk_list(pack([CHUNK_LIST_NODE, 8, HASH, [2**62]])).level == 8


@given(st.binary(max_size=80) | st.recursive(
    st.integers(-5, 300) | st.sampled_from([b"", b"a", HASH, b"..", "text", None, 1.5, True]),
    lambda inner: st.lists(inner, max_size=8), max_leaves=30,
).map(pack))  # fmt: skip
def test_any_bytes_are_refused_or_safe(data: bytes) -> None:
    try:
        node = parse_directory(data)
    except Malformed:
        node = None
    if node is not None:
        assert all(entry.name not in (b"", b".", b"..") and b"/" not in entry.name for entry in node.entries)
    try:
        assert all(length > 0 for length in parse_chunk_list(data).lengths)
    except Malformed:
        pass
    try:
        assert all(length > 0 for length in parse_layout(data)[1:])
    except Malformed:
        pass


@given(st.data())
def test_mutated_nodes_are_refused_or_safe(data: st.DataObject) -> None:
    good = directory(DIRECTORY_ENTRY, LINK_ENTRY, FILE_ENTRY)
    position = data.draw(st.integers(0, len(good) - 1))
    mutated = bytearray(good)
    mutated[position] = data.draw(st.integers(0, 255))
    try:
        entries = parse_directory(bytes(mutated)).entries
    except Malformed:
        return
    assert all(0 < len(e.name) <= 1024 and b"/" not in e.name and 0 <= e.mode <= 0o7777 for e in entries)


@pytest.mark.parametrize("data", [b"", b"\x01", pack([1, HASH]), pack([7, HASH, [HASH[:5]]]), os.urandom(40)])
def test_damaged_cached_content_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        FileContent.decode(data)


def test_contents_differ_when_anything_differs() -> None:
    content = FileContent(9, HASH, HASH * 2, (4, 5))
    assert content._replace() == content
    assert content._replace(lengths=(5, 4)) != content
