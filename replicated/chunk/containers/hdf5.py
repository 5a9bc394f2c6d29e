"""The datasets of an HDF5 file, as Keras and h5py write weights.

Follows the groups from the root: those of the classic form (a tree of symbol tables) and those of the
newer one as long as their links are in the group's own header. Datasets lie in one piece or in chunks
that a classic tree names. What is kept in other ways is not found; when that is much, the gaps are too
long for the file to be worth it and it is cut by content. Every address is visited once, so cycles end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from replicated.chunk.containers.source import Extent, Malformed, Source, unpack

_MAGIC = b"\x89HDF\r\n\x1a\n"
_VERSION_OFFSET = len(_MAGIC)
#: By version of the superblock: where the sizes of addresses and lengths, the base address and the root's
#: address are.
_SUPERBLOCKS: Final = {0: (13, 24, 64), 1: (13, 28, 68), 2: (9, 12, 36), 3: (9, 12, 36)}
_SUPERBLOCK_BYTES = 76
# Nobody writes addresses and lengths of other sizes today.
_SIZES = b"\x08\x08"
_ADDRESS = struct.Struct("<Q")
_NO_ADDRESS = (1 << 64) - 1

_HEADER_V1_VERSION = 1
#: Length of the messages in the first block of an object's header.
_HEADER_V1 = struct.Struct("<8xI4x")
#: Kind, length and flags of a message, whose content follows.
_MESSAGE_V1 = struct.Struct("<2HB3x")
_HEADER_V2_MAGIC = b"OHDR"
#: Flags, which say what follows.
_HEADER_V2 = struct.Struct("<5xB")
_HAS_TIMES, _TIMES_BYTES = 0x20, 16
_HAS_LIMITS, _LIMITS_BYTES = 0x10, 4
_HAS_ORDER, _ORDER_BYTES = 0x04, 2
#: By two bits of flags.
_LENGTHS: Final = (struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q"))
_CONTINUATION_V2_MAGIC = b"OCHK"
_CHECKSUM_BYTES = 4
_MESSAGE_V2 = struct.Struct("<BHB")
_IS_SHARED = 0x02
# Of all objects together: thrice what the most datasets need that gaps worth it have room for. Four bytes
# make a message, so that without a bound a file of nothing else would take seconds.
_MAX_MESSAGES = 1 << 18

_DATATYPE, _LINK, _DATA_LAYOUT, _FILTERS, _CONTINUATION, _SYMBOL_TABLE = 0x03, 0x06, 0x08, 0x0B, 0x10, 0x11

#: Kind, level and number of children of a tree's node; its two neighbours are not needed.
_NODE = struct.Struct("<4x2BH16x")
_NODE_MAGIC = b"TREE"
_NODE_OF_GROUP, _NODE_OF_CHUNKS = 0, 1
_GROUP_KEY_BYTES = 8
#: The stored length of a chunk begins a key of 8 bytes and 8 for each dimension.
_CHUNK_KEY = struct.Struct("<I4x")
_TABLE_MAGIC = b"SNOD"
_TABLE = struct.Struct("<6xH")
#: Address of an object's header, and whether the name is a symbolic link instead.
_TABLE_ENTRY = struct.Struct("<8xQI20x")
_SYMBOLIC = 2

#: Version, class.
_DATA_LAYOUT_START = struct.Struct("<2B")
_CONTIGUOUS, _CHUNKED = 1, 2
#: Address and length, in layouts and continuations.
_PLACE = struct.Struct("<2Q")
#: Number of dimensions, address of the tree.
_CHUNKS = struct.Struct("<BQ")
#: Class in the low four bits, bytes of an element.
_DATATYPE_START = struct.Struct("<B3xI")
#: Integers, floating point, bit fields, opaque (numpy keeps bfloat16 in it), enumerations (booleans).
_CLASSES_OF_NUMBERS = (0, 1, 4, 5, 8)
#: Flags of a link; the kind of link, order and character set come before the name where they say so.
_LINK_START = struct.Struct("<xB")
_LINK_HAS_KIND, _LINK_HAS_ORDER, _LINK_HAS_CHARSET = 0x08, 0x04, 0x10


def begins(head: bytes) -> bool:
    """Whether a file or an entry that begins like this is an HDF5 file."""
    return head.startswith(_MAGIC)


def find_extents(source: Source, start: int, size: int) -> Iterator[Extent]:
    """The data of each dataset of the file that lies at `start`, and of each chunk of those in chunks."""
    file = _File(source, start, size)
    objects = [file.root]
    while objects:
        properties: dict[int, bytes] = {}
        for kind, content in file.messages(objects.pop()):
            if kind == _SYMBOL_TABLE:
                objects.extend(file.members(*unpack(_ADDRESS, content)))
            elif kind == _LINK:
                objects.extend(_linked(content))
            else:
                properties[kind] = content
        if _DATA_LAYOUT in properties:
            yield from file.data(properties)


class _File:
    """The structures of one file; addresses count from where it begins."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        self._source = source
        self._start = start
        self._visited: set[int] = set()
        self._messages_left = _MAX_MESSAGES
        superblock = source.read(start, min(size, _SUPERBLOCK_BYTES))
        (version,) = unpack(_LENGTHS[0], superblock, _VERSION_OFFSET)
        if version not in _SUPERBLOCKS:
            raise Malformed(f"superblock of version {version}")
        sizes_offset, base_offset, root_offset = _SUPERBLOCKS[version]
        if superblock[sizes_offset : sizes_offset + 2] != _SIZES:
            raise Malformed("addresses of another size")
        if unpack(_ADDRESS, superblock, base_offset) != (0,):
            raise Malformed("another file comes first")
        (self.root,) = unpack(_ADDRESS, superblock, root_offset)

    def messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Kind and content of each message of an object; none when it has been visited or has no header.

        Of shared messages, which are kept elsewhere, the content is empty.
        """
        if self._is_new(address):
            if self._read(address, 1)[0] == _HEADER_V1_VERSION:
                (length,) = unpack(_HEADER_V1, self._read(address, _HEADER_V1.size))
                yield from self._messages_of_blocks(address + _HEADER_V1.size, length, _MESSAGE_V1, 0)
            else:
                yield from self._messages_v2(address)

    def members(self, tree: int) -> Iterator[int]:
        """Addresses of the objects in a group of the classic form."""
        for _, table in self._leaves(tree, _NODE_OF_GROUP, _GROUP_KEY_BYTES):
            head = self._read(table, _TABLE.size)
            if not head.startswith(_TABLE_MAGIC):
                raise Malformed("a group without a table")
            (count,) = unpack(_TABLE, head)
            entries = self._read(table + _TABLE.size, count * _TABLE_ENTRY.size)
            yield from (header for header, kind in _TABLE_ENTRY.iter_unpack(entries) if kind != _SYMBOLIC)

    def data(self, properties: dict[int, bytes]) -> Iterator[Extent]:
        """Where the data of a dataset lies; nothing when it lies in its header, or in a way not known."""
        layout = properties[_DATA_LAYOUT]
        version, kind = unpack(_DATA_LAYOUT_START, layout)
        item_bytes = 0 if _FILTERS in properties else _item_bytes(properties.get(_DATATYPE, b""))
        if version in (3, 4) and kind == _CONTIGUOUS:
            address, size = unpack(_PLACE, layout, _DATA_LAYOUT_START.size)
            if address != _NO_ADDRESS:
                yield Extent(self._start + address, size, item_bytes)
        elif version == 3 and kind == _CHUNKED:
            dimensions, tree = unpack(_CHUNKS, layout, _DATA_LAYOUT_START.size)
            key_bytes = _CHUNK_KEY.size + 8 * dimensions
            for key, address in self._leaves(tree, _NODE_OF_CHUNKS, key_bytes):
                (size,) = unpack(_CHUNK_KEY, key)
                yield Extent(self._start + address, size, item_bytes)

    def _is_new(self, address: int) -> bool:
        is_new = address != _NO_ADDRESS and address not in self._visited
        self._visited.add(address)
        return is_new

    def _read(self, address: int, length: int) -> bytes:
        return self._source.read(self._start + address, length)

    def _messages_v2(self, address: int) -> Iterator[tuple[int, bytes]]:
        head = self._read(address, _HEADER_V2.size)
        if not head.startswith(_HEADER_V2_MAGIC):
            raise Malformed("an object without a header")
        (flags,) = unpack(_HEADER_V2, head)
        position = address + _HEADER_V2.size
        position += _TIMES_BYTES if flags & _HAS_TIMES else 0
        position += _LIMITS_BYTES if flags & _HAS_LIMITS else 0
        form = _LENGTHS[flags & 3]
        (length,) = unpack(form, self._read(position, form.size))
        order_bytes = _ORDER_BYTES if flags & _HAS_ORDER else 0
        yield from self._messages_of_blocks(position + form.size, length, _MESSAGE_V2, order_bytes)

    def _messages_of_blocks(
        self, address: int, length: int, form: struct.Struct, order_bytes: int
    ) -> Iterator[tuple[int, bytes]]:
        """The messages of an object's first block and of those that continue it."""
        blocks = [(address, length)]
        while blocks:
            block = self._read(*blocks.pop())
            # Only blocks of the newer form that continue begin with this, which is no message.
            position = len(_CONTINUATION_V2_MAGIC) if block.startswith(_CONTINUATION_V2_MAGIC) else 0
            end = len(block) - (_CHECKSUM_BYTES if position else 0)
            while position + form.size + order_bytes <= end:
                self._messages_left -= 1
                if self._messages_left < 0:
                    raise Malformed("too many messages")
                kind, content_length, flags = unpack(form, block, position)
                position += form.size + order_bytes
                content = block[position : min(position + content_length, end)]
                position += content_length
                if kind == _CONTINUATION:
                    place = unpack(_PLACE, content)
                    if self._is_new(place[0]):
                        blocks.append((place[0], place[1]))
                else:
                    yield kind, b"" if flags & _IS_SHARED else content

    def _leaves(self, tree: int, kind: int, key_bytes: int) -> Iterator[tuple[bytes, int]]:
        """Key and address of all that a tree refers to."""
        nodes = [tree]
        while nodes:
            node = nodes.pop()
            if not self._is_new(node):
                continue
            head = self._read(node, _NODE.size)
            node_kind, level, count = unpack(_NODE, head)
            if not head.startswith(_NODE_MAGIC) or node_kind != kind:
                raise Malformed("a tree without nodes")
            form = struct.Struct(f"<{key_bytes}sQ")
            for key, address in form.iter_unpack(self._read(node + _NODE.size, count * form.size)):
                if level > 0:
                    nodes.append(address)
                elif self._is_new(address):
                    yield key, address


def _linked(content: bytes) -> Iterator[int]:
    """The address of the object that a link message names; nothing for other than hard links."""
    (flags,) = unpack(_LINK_START, content)
    position = _LINK_START.size
    if flags & _LINK_HAS_KIND:
        if content[position : position + 1] != b"\0":
            return
        position += 1
    position += 8 if flags & _LINK_HAS_ORDER else 0
    position += 1 if flags & _LINK_HAS_CHARSET else 0
    form = _LENGTHS[flags & 3]
    (name_length,) = unpack(form, content, position)
    yield from unpack(_ADDRESS, content, position + form.size + name_length)


def _item_bytes(datatype: bytes) -> int:
    """Bytes of one number of a dataset; 0 for compound types and those kept elsewhere."""
    if len(datatype) < _DATATYPE_START.size:
        return 0
    class_and_version, size = unpack(_DATATYPE_START, datatype)
    is_number = class_and_version & 0x0F in _CLASSES_OF_NUMBERS
    return size if is_number and size in (1, 2, 4, 8) else 0
