"""The bytes that go to and from the kernel: their lengths, their order, and what is no request."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replicated.mount.engine.native import answers, protocol
from replicated.mount.engine.native.answers import Answers
from replicated.mount.engine.native.protocol import Greeting, ProtocolError, Request
from replicated.mount.filesystem import Attributes, Usage

NUMBERS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**32 - 1)
ATTRIBUTES = st.builds(
    Attributes,
    inode=NUMBERS,
    mode=SMALL,
    size=st.integers(0, 2**63 - 1),
    mtime_ns=st.integers(-(2**63), 2**63 - 1),
    is_lasting=st.booleans(),
)
NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)


def request_bytes(operation, unique, inode, body, length=None):
    length = protocol.REQUEST_HEADER.size + len(body) if length is None else length
    return protocol.REQUEST_HEADER.pack(length, operation, unique, inode, 1, 2, 3, 0, 0) + body


@given(SMALL, NUMBERS, NUMBERS, st.binary(max_size=100))
def test_a_request_is_taken_apart(operation, unique, inode, body):
    data = memoryview(request_bytes(operation, unique, inode, body))
    assert protocol.parse_request(data) == Request(operation, unique, inode, body, 3)


@given(st.binary(max_size=200))
@example(request_bytes(1, 2, 3, b"", length=41))
@example(b"")
def test_bytes_that_are_no_request_are_refused(data):
    try:
        request = protocol.parse_request(memoryview(data))
    except ProtocolError:
        return
    assert len(request.body) == len(data) - protocol.REQUEST_HEADER.size


@given(st.binary(max_size=80))
def test_bodies_of_any_bytes_are_read_or_refused(body):
    for read in (
        protocol.parse_name,
        protocol.parse_greeting,
        lambda body: protocol.unpack(protocol.READ_IN, body),
        lambda body: protocol.unpack(protocol.INTERRUPT_IN, body),
        lambda body: protocol.parse_name(body, protocol.XATTR_IN.size),
    ):
        try:
            read(body)
        except ProtocolError:
            continue


@given(NAMES)
def test_a_name_is_what_stands_before_its_end(name):
    assert protocol.parse_name(name + b"\0") == name
    assert protocol.parse_name(b"12345678" + name + b"\0", 8) == name


@pytest.mark.parametrize("body", [b"", b"\0", b"abc", b"a\0b\0", b"a\0b"])
def test_names_that_do_not_end_once_are_refused(body):
    with pytest.raises(ProtocolError):
        protocol.parse_name(body)


def test_structures_are_as_long_as_those_of_the_kernel():
    # sizeof in <linux/fuse.h>
    assert protocol.REQUEST_HEADER.size == 40
    assert protocol.ANSWER_HEADER.size == 16
    assert protocol.READ_IN.size == 40
    assert protocol.RELEASE_IN.size == 24
    assert protocol.XATTR_IN.size == protocol.XATTR_OUT.size == 8
    assert protocol.OPEN_OUT.size == 16
    assert protocol.STATFS_OUT.size == 80
    assert protocol.INIT_OUT.size == 64
    assert protocol.INVAL_INODE_OUT.size == 24
    assert protocol.BACKING_OPEN.size == 16
    attributes = Attributes(1, 0o100644, 0, 0)
    assert len(Answers(0, 0).attributes(attributes)) == 104
    assert len(Answers(0, 0).entry(attributes)) == len(answers.absent_entry()) == 128
    assert len(Answers(0, 0).listing([(b"n", attributes, 1)], 4096)[0]) == 160
    assert len(Answers(0, 0).plain_listing([(b"12345678", attributes, 1)], 4096)[0]) == 32


@given(SMALL, SMALL, SMALL, SMALL)
def test_a_greeting_has_two_words_of_flags_when_it_says_so(minor, readahead, flags, more):
    body = struct.pack("=IIIII", 7, minor, readahead, flags, more)
    parsed = protocol.parse_greeting(body + bytes(44))
    expected = flags | more << 32 if flags & protocol.INIT_EXT else flags
    assert parsed == Greeting(7, minor, readahead, expected)


@given(NUMBERS, NUMBERS)
def test_nothing_is_agreed_on_that_was_not_offered_and_wanted(offered, wanted):
    answer, agreed = protocol.pack_greeting(
        Greeting(7, 45, 1 << 20, offered),
        wanted,
        max_background=64,
        congestion_threshold=48,
        max_write=65536,
        max_pages=256,
        stack_depth=1,
    )
    assert agreed & ~offered == 0
    assert agreed & ~wanted & ~protocol.INIT_EXT == 0
    fields = protocol.INIT_OUT.unpack(answer)
    assert fields[:3] == (protocol.MAJOR, protocol.MINOR, 1 << 20)
    assert fields[3] | fields[10] << 32 == agreed
    assert fields[4:7] == (64, 48, 65536)
    assert fields[8] == 256
    assert fields[11] == (1 if agreed & protocol.PASSTHROUGH else 0)


def unpack_attributes(data):
    fields = struct.unpack("=QQQqqqIIIIIIIIII", data)
    assert fields[3] == fields[4] == fields[5]
    assert fields[6] == fields[7] == fields[8]
    inode, size, blocks, seconds, mode = *fields[:4], fields[9]
    assert blocks == (size + 511) // 512
    assert fields[10:] == (1, 5, 6, 0, 4096, 0)
    return inode, mode, size, seconds * 10**9 + fields[6]


@given(ATTRIBUTES)
def test_attributes_come_back_as_they_were(attributes):
    data = Answers(5, 6).attributes(attributes)
    seconds, nanoseconds, _ = struct.unpack("=QII", data[:16])
    assert (seconds, nanoseconds) == (86400 if attributes.is_lasting else 1, 0)
    assert unpack_attributes(data[16:]) == attributes[:4]


@given(ATTRIBUTES, st.integers(0, 9))
def test_an_entry_comes_back_as_it_was(attributes, generation):
    packer = Answers(5, 6)
    packer.generations[attributes.inode] = generation
    data = packer.entry(attributes)
    fields = struct.unpack("=QQQQII", data[:40])
    valid = 86400 if attributes.is_lasting else 1
    assert fields == (attributes.inode, generation, valid, valid, 0, 0)
    assert unpack_attributes(data[40:]) == attributes[:4]


def parse_listing(data):
    """What the kernel makes of an answer to READDIRPLUS."""
    entries = []
    while data:
        nodeid, generation, *_ = struct.unpack("=QQQQII", data[:40])
        attributes = unpack_attributes(data[40:128])
        inode, following, length, kind = struct.unpack("=QQII", data[128:152])
        assert inode == attributes[0] and kind == attributes[1] >> 12
        name = data[152 : 152 + length]
        end = -(-(152 + length) // 8) * 8
        assert not any(data[152 + length : end])
        entries.append((name, nodeid, generation, attributes, following))
        data = data[end:]
    return entries


ENTRIES = st.lists(st.tuples(NAMES | st.sampled_from([b".", b".."]), ATTRIBUTES, NUMBERS), max_size=6)


@given(ENTRIES, st.integers(0, 2000))
def test_a_listing_holds_the_entries_that_fit(entries, room):
    packer = Answers(5, 6)
    packer.generations.update({entries[0][1].inode: 3} if entries else {})
    data, fits = packer.listing(entries, room)
    assert len(data) <= room
    listed = parse_listing(data)
    assert fits == (len(listed) == len(entries))
    for (name, nodeid, generation, attributes, following), (given_name, expected, offset) in zip(
        listed, entries, strict=False
    ):
        assert (name, attributes, following) == (given_name, expected[:4], offset)
        # The kernel counts how often it was told of an inode, but not by these two names.
        assert nodeid == (0 if name in (b".", b"..") else expected.inode)
        assert generation == packer.generations.get(expected.inode, 0)
    if not fits:
        following_size = -(-(152 + len(entries[len(listed)][0])) // 8) * 8
        assert len(data) + following_size > room


@given(ENTRIES, st.integers(0, 500))
def test_a_plain_listing_holds_the_entries_that_fit(entries, room):
    data, fits = Answers(5, 6).plain_listing(entries, room)
    assert len(data) <= room
    listed = []
    while data:
        inode, following, length, kind = struct.unpack("=QQII", data[:24])
        listed.append((data[24 : 24 + length], inode, following, kind))
        data = data[-(-(24 + length) // 8) * 8 :]
    assert fits == (len(listed) == len(entries))
    assert listed == [(n, a.inode, offset, a.mode >> 12) for n, a, offset in entries[: len(listed)]]


@given(st.builds(Usage, size_bytes=st.integers(0, 2**63), entries=NUMBERS))
def test_usage_has_nothing_free(usage):
    blocks, free, available, files, files_free, size, name, fragment = protocol.STATFS_OUT.unpack(
        answers.usage(usage)
    )
    assert (free, available, files_free) == (0, 0, 0)
    assert (files, name) == (usage.entries, 255)
    assert size == fragment == 4096
    assert 0 <= blocks * size - usage.size_bytes < size
