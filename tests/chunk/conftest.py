"""Files of tensors, byte for byte as their writers lay them out, without needing these writers.

Compared with the files of torch 2.15, safetensors 0.8, numpy 2.4, keras 3.15 and h5py 3.14; h5py opens
what `Hdf5` makes. Everything here returns the file and where its data lies, in the order of writing.
"""

import io
import json
import struct
import zipfile
import zlib

import pytest

NO_ADDRESS = (1 << 64) - 1
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def safetensors_file(tensors, metadata=None):
    """`tensors`: name → (dtype, data)."""
    header, offset = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, data) in tensors.items():
        shape = [len(data) // ITEM_BYTES.get(dtype, 1)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = [(start + item["data_offsets"][0], len(tensors[name][1])) for name, item in header.items()
              if name != "__metadata__"]  # fmt: skip
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()), places


def npy_file(descr, data, version=1, count=0):
    """`descr`: as `numpy.dtype.descr` or `numpy.dtype.str` gives it."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({count},), }}"
    length_format = "<H" if version == 1 else "<I"
    start = 8 + struct.calcsize(length_format)
    header = header.ljust(-(-(start + len(header) + 1) // 64) * 64 - start - 1) + "\n"
    file = b"\x93NUMPY" + bytes([version, 0]) + struct.pack(length_format, len(header)) + header.encode()
    return file + data, [(len(file), len(data))]


def torch_file(name, storages, description=b"a pickle", is_long=False):
    """What `torch.save` writes: data aligned to 64 bytes by extra fields, checksums behind the data.

    `is_long`: the directory has the long form of all numbers, as for entries behind 4 GiB.
    """
    entries = {"data.pkl": description, ".format_version": b"1", ".storage_alignment": b"64"}
    entries |= {"byteorder": b"little"} | {f"data/{number}": data for number, data in enumerate(storages)}
    entries |= {"version": b"3\n", ".data/serialization_id": b"0" * 40}
    file, directory, places = bytearray(), bytearray(), []
    for entry, data in entries.items():
        path = f"{name}/{entry}".encode()
        offset, checksum = len(file), zlib.crc32(data)
        padding = -(offset + 30 + len(path) + 4) % 64
        file += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(path), 4 + padding)
        file += path + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        if entry.startswith("data/"):
            places.append((len(file), len(data)))
        file += data + struct.pack("<4s3I", b"PK\7\x08", checksum, len(data), len(data))
        numbers, extra = [len(data), len(data), offset], b""
        if is_long:
            extra = struct.pack("<2H3Q", 1, 24, *numbers)
            numbers = [0xFFFFFFFF] * 3
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, checksum, *numbers[:2],
                                 len(path), len(extra), 0, 0, 0, 0, numbers[2]) + path + extra  # fmt: skip
    start, count = len(file), len(entries)
    place = [len(directory), start]
    file += directory
    long_end = len(file)
    file += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, *place)
    file += struct.pack("<4sIQI", b"PK\6\7", 0, long_end, 1)
    place = [0xFFFFFFFF] * 2 if is_long else place
    file += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, *place, 0)
    return bytes(file), places


def zip_file(entries, method=zipfile.ZIP_STORED):
    """`entries`: name → data; the places are those of whole entries."""
    buffer, places = io.BytesIO(), []
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            # The long form, as numpy and Keras write.
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(data)
        for info in archive.infolist():
            places.append((info.header_offset + 30 + len(info.filename) + 20, info.compress_size))
    return buffer.getvalue(), places


class Hdf5:
    """Makes HDF5 files from the inside to the outside: an object is made before the group that names it.

    `newest`: headers, links and superblock of the newer form, as `libver="latest"` gives (without
    checksums).
    """

    def __init__(self, newest=False):
        self.newest = newest
        self.file = bytearray(96)
        self.places = []

    def put(self, data):
        self.file += bytes(-len(self.file) % 8)
        self.file += data
        return len(self.file) - len(data)

    def dataset(self, data, item_bytes=4, datatype_class=1, flags=0):
        """Data in one piece; returns the address of the object."""
        address = self.put(data)
        self.places.append((address, len(data)))
        layout = struct.pack("<2B2Q", 3, 1, address, len(data))
        return self.object(self._messages(len(data) // item_bytes, item_bytes, datatype_class, flags, layout))

    def chunked_dataset(self, chunks, item_bytes=4, filters=()):
        """Data in chunks of equal length, each of which a tree names."""
        size = len(chunks[0])
        children = b""
        for number, chunk in enumerate(chunks):
            address = self.put(chunk)
            self.places.append((address, len(chunk)))
            children += struct.pack("<2I2Q", len(chunk), 0, number * size // item_bytes, 0)
            children += struct.pack("<Q", address)
        last_key = struct.pack("<2I2Q", 0, 0, len(chunks) * size // item_bytes, 0)
        tree = self.tree(1, 0, len(chunks), children + last_key)
        layout = struct.pack("<3BQ2I", 3, 2, 2, tree, size // item_bytes, item_bytes)
        messages = self._messages(len(chunks) * size // item_bytes, item_bytes, 1, 0, layout)
        return self.object(messages + [(0x0B, 0, data) for data in filters])

    def group(self, members):
        """`members`: name → address; returns the address of the object."""
        if self.newest:
            links = [(6, 0, b"\1\0" + bytes([len(name)]) + name.encode() + struct.pack("<Q", address))
                     for name, address in members.items()]  # fmt: skip
            return self.object(links)
        names, entries = b"\0" * 8, []
        for name, address in sorted(members.items()):
            entries.append((len(names), address))
            names += name.encode().ljust(len(name) // 8 * 8 + 8, b"\0")
        heap_data = self.put(names)
        heap = self.put(struct.pack("<4s4x3Q", b"HEAP", len(names), 1, heap_data))
        leaves = []
        # Two levels of trees as soon as there are more than eight names.
        for start in range(0, len(entries), 8):
            rows = entries[start : start + 8]
            body = b"".join(struct.pack("<2Q24x", *row) for row in rows).ljust(8 * 40, b"\0")
            table = self.put(struct.pack("<4sBxH", b"SNOD", 1, len(rows)) + body)
            first = struct.pack("<Q", 0 if start == 0 else entries[start - 1][0])
            last = struct.pack("<Q", rows[-1][0])
            leaves.append((first, self.tree(0, 0, 1, first + struct.pack("<Q", table) + last), last))
        root = leaves[0][1]
        if len(leaves) > 1:
            children = b"".join(first + struct.pack("<Q", leaf) for first, leaf, _ in leaves) + leaves[-1][2]
            root = self.tree(0, 1, len(leaves), children)
        return self.object([(0x11, 0, struct.pack("<2Q", root, heap))])

    def tree(self, kind, level, count, children):
        head = struct.pack("<4s2BH2Q", b"TREE", kind, level, count, NO_ADDRESS, NO_ADDRESS)
        return self.put(head + children.ljust(1600, b"\0"))

    def object(self, messages):
        """An object's header, of which the last message is in a block of its own when there are several."""
        if self.newest:
            blocks = [b"".join(struct.pack("<BHB", kind, len(data), flags) + data
                               for kind, flags, data in part) for part in self._parts(messages)]  # fmt: skip
            if len(blocks) > 1:
                rest = b"OCHK" + blocks[1] + bytes(4)
                blocks[0] += struct.pack("<BHB2Q", 0x10, 16, 0, self.put(rest), len(rest))
            return self.put(
                b"OHDR\2\x22" + bytes(16) + struct.pack("<I", len(blocks[0])) + blocks[0] + bytes(4)
            )
        blocks = [b"".join(struct.pack("<2HB3x", kind, -(-len(data) // 8) * 8, flags) + data
                           + bytes(-len(data) % 8) for kind, flags, data in part)
                  for part in self._parts(messages)]  # fmt: skip
        count = len(messages)
        if len(blocks) > 1:
            count += 1
            blocks[0] += struct.pack("<2HB3x2Q", 0x10, 16, 0, self.put(blocks[1]), len(blocks[1]))
        return self.put(struct.pack("<BxH2I4x", 1, count, 1, len(blocks[0])) + blocks[0])

    def finish(self, root):
        """The file and where the data lies."""
        end = len(self.file)
        head = b"\x89HDF\r\n\x1a\n"
        if self.newest:
            head += struct.pack("<4B4Q4x", 2, 8, 8, 0, 0, NO_ADDRESS, end, root)
        else:
            head += struct.pack("<8B2HI4Q", 0, 0, 0, 0, 0, 8, 8, 0, 4, 16, 0, 0, NO_ADDRESS, end, NO_ADDRESS)
            head += struct.pack("<2QI20x", 0, root, 0)
        self.file[: len(head)] = head
        return bytes(self.file), self.places

    @staticmethod
    def _messages(count, item_bytes, datatype_class, flags, layout):
        # The properties of floating point: little-endian, and the fields of single precision.
        properties = struct.pack("<2H4BI", 0, 8 * item_bytes, 23, 8, 0, 23, 127)
        datatype = struct.pack("<4BI", 0x10 | datatype_class, 0x20, 31, 0, item_bytes) + properties
        dataspace = struct.pack("<BBB5xQ", 1, 1, 0, count)
        return [(1, 0, dataspace), (3, flags, datatype), (5, 0, b"\2\2\2\0"), (8, 0, layout)]

    @staticmethod
    def _parts(messages):
        return [messages[:-1], messages[-1:]] if len(messages) > 1 else [messages]


class TensorFiles:
    """The makers of files, for tests that cannot import this module."""

    safetensors = staticmethod(safetensors_file)
    npy = staticmethod(npy_file)
    torch = staticmethod(torch_file)
    zip = staticmethod(zip_file)
    Hdf5 = Hdf5


@pytest.fixture(scope="session")
def files():
    return TensorFiles
