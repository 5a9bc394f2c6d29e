#!/usr/bin/env python3
"""Reads a repository with nothing but docs/format.md: no import of the project.

    python standalone_reader.py REPOSITORY_DIR list
    python standalone_reader.py REPOSITORY_DIR extract SNAPSHOT_ID DIR

Needs the packages blake3, msgpack and zstandard. Every hash is checked, nothing is written outside DIR,
and DIR must not exist: so no link that somebody put there can be followed.
"""

import json
import os
import re
import struct
import sys
from pathlib import Path

import msgpack
import zstandard
from blake3 import blake3

FILE, DIRECTORY, SYMLINK = 0, 1, 2
MAX_CHUNK_BYTES = 16 << 20
MAX_DEPTH = 4096
MAX_REGIONS = 65536
SEAL = re.compile(rb',\n "blake3": "([0-9a-f]{64})"\n\}\n')
SEAL_LENGTH = 82
ID = re.compile(r"[0-9a-f]{64}")
LEVELLED_NAME = re.compile(r"[0-9a-f]{2}-[0-9a-f]{64}")

INDEX_HEADER = struct.Struct("<8sB3sI")  # magic, version, zeros, number of sections
SECTION = struct.Struct("<32sIII")  # pack, kind and number of bases, size of the pack, number of records
RECORD = struct.Struct("<32sIIII")  # chunk, offset, stored length, plain length, codec and number of the base
RAW, ZSTD, PLANES, DELTA = range(4)


class Damaged(Exception):
    """The repository does not hold what the format says."""


def require(condition, what):
    if not condition:
        raise Damaged(what)


def read_sealed(path):
    """The members of a sealed JSON object."""
    data = path.read_bytes()
    seal = SEAL.fullmatch(data[-SEAL_LENGTH:])
    require(seal, f"{path} does not end with its hash")
    text = data[:-SEAL_LENGTH] + b"\n}"
    require(blake3(text).hexdigest().encode() == seal.group(1), f"the hash of {path} is wrong")
    members = json.loads(text)
    require(members["format"] == 1, f"{path} was written by a later version")
    return members


def read_index(path):
    """Pairs of a chunk's id and (pack, offset, stored length, plain length, codec)."""
    data = path.read_bytes()
    body, digest = data[:-32], data[-32:]
    require(blake3(body).digest() == digest, f"the hash of {path} is wrong")
    magic, version, _, sections = INDEX_HEADER.unpack_from(body)
    require((magic, version) == (b"REPLINDX", 1), f"{path} is not an index object of version 1")
    position = INDEX_HEADER.size
    for _ in range(sections):
        pack, kind, _, count = SECTION.unpack_from(body, position)
        position += SECTION.size
        for _ in range(count):
            chunk, offset, stored, plain, codec = RECORD.unpack_from(body, position)
            position += RECORD.size
            yield chunk, (pack.hex(), offset, stored, plain, codec & 0xFF)
        # The bases: what a chunk needs stands before its stored bytes as well.
        position += 32 * (kind >> 8)
    require(position == len(body), f"{path} has bytes after its last section")


def open_frame(frame, length):
    """What a zstd frame of so many plain bytes holds."""
    parameters = zstandard.get_frame_parameters(frame)
    # Checked first: the decompressor allocates what the frame declares.
    require(parameters.content_size == length, "a frame holds another number of bytes than it should")
    require(parameters.window_size <= MAX_CHUNK_BYTES, "a frame needs too much memory")
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def join_planes(stored, length, widths):
    """The bytes whose planes are stored."""
    width, flags = stored[:2]
    require(width in widths and flags < 1 << width, f"planes {flags:#x} of numbers of {width} bytes")
    count, frames = length // width, bin(flags).count("1")
    compressed = iter(struct.unpack_from(f"<{frames}I", stored, 2))
    position = 2 + 4 * frames
    plain = bytearray(length)
    for plane in range(width):
        is_frame = flags >> plane & 1
        end = position + (next(compressed) if is_frame else count)
        data = open_frame(stored[position:end], count) if is_frame else stored[position:end]
        require(len(data) == count, "the planes of a chunk do not fit its length")
        plain[plane : count * width : width] = data
        position = end
    require(len(stored) - position == length % width, "the planes of a chunk do not fit its length")
    plain[count * width :] = stored[position:]
    return bytes(plain)


def add_differences(changes, base, width):
    """The bytes that differ from those of the base by so much."""
    whole = len(base) // width * width
    plain = bytearray()
    for start, end, size in ((0, whole, width), (whole, len(base), 1)):
        for at in range(start, end, size):
            change = int.from_bytes(changes[at : at + size], "little")
            change = (change >> 1) ^ -(change & 1)
            number = int.from_bytes(base[at : at + size], "little") + change
            plain += (number % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(plain)


class Repository:
    """A repository in a directory."""

    def __init__(self, root):
        self.root = Path(root)
        features = read_sealed(self.root / "repository.json")["features"]
        require(features == [], f"the repository needs the features {features}")
        self.chunks = {}
        condemned = set()
        for path in self.root.glob("log/condemned/*"):
            if ID.fullmatch(path.name):
                condemned.update(read_sealed(path)["packs"])
        for path in sorted(self.root.glob("log/index/*")):
            if LEVELLED_NAME.fullmatch(path.name):
                for chunk, place in read_index(path):
                    if place[0] in condemned:
                        continue
                    # Rather where it has no base: two chunks may each be a difference to the other somewhere.
                    if chunk not in self.chunks or place[-1] != DELTA:
                        self.chunks[chunk] = place

    def read_chunk(self, chunk, is_base=False):
        """The plain bytes of a chunk or node."""
        require(chunk in self.chunks, f"chunk {chunk.hex()} is in no index object")
        pack, offset, stored_length, plain_length, codec = self.chunks[chunk]
        require(codec <= DELTA, f"chunk {chunk.hex()} has the unknown codec {codec}")
        require(codec != DELTA or not is_base, f"the base {chunk.hex()} has a base")
        require(plain_length <= MAX_CHUNK_BYTES, f"chunk {chunk.hex()} is too large")
        with (self.root / "packs" / pack[:2] / pack).open("rb") as file:
            file.seek(offset)
            stored = file.read(stored_length)
        plain = stored
        if codec == ZSTD:
            plain = open_frame(stored, plain_length)
        elif codec == PLANES:
            plain = join_planes(stored, plain_length, (2, 4, 8))
        elif codec == DELTA:
            base = self.read_chunk(stored[:32], is_base=True)
            require(len(base) == plain_length, f"chunk {chunk.hex()} has a base of another length")
            changes = join_planes(stored[32:], plain_length, (1, 2, 4, 8))
            plain = add_differences(changes, base, stored[32])
        require(blake3(plain).digest() == chunk, f"chunk {chunk.hex()} in pack {pack} is damaged")
        return plain

    def read_node(self, node, kind):
        """The members of a node after the first, which says what it is."""
        data = self.read_chunk(node)
        value = msgpack.unpackb(data, use_list=True, strict_map_key=True)
        require(msgpack.packb(value) == data, f"node {node.hex()} is not in its shortest encoding")
        found, *members = value
        require(found == kind, f"node {node.hex()} is not of the right kind")
        return members

    def read_level(self, node, kind, above):
        """Level and members of a node below one of level `above`, or of a root."""
        level, *members = self.read_node(node, kind)
        require(0 <= level <= 8, f"node {node.hex()} is on an impossible level")
        require(above is None or level == above - 1, f"node {node.hex()} is on the wrong level")
        return level, members

    def read_directory(self, node):
        """The entries of a directory, checked, in order."""
        previous = b""
        for entry in self._read_entries(node):
            name = entry[0]
            require(isinstance(name, bytes) and name > previous, f"directory {node.hex()} is not sorted")
            safe = name not in (b".", b"..") and b"/" not in name and b"\0" not in name
            require(safe and len(name) <= 1024, f"directory {node.hex()} holds the name {name!r}")
            previous = name
            yield entry

    def _read_entries(self, node, above=None):
        level, (items,) = self.read_level(node, 1, above)
        if level == 0:
            yield from items
            return
        for last_name, below, count in items:
            seen, name = 0, None
            for entry in self._read_entries(below, level):
                seen, name = seen + 1, entry[0]
                yield entry
            require((seen, name) == (count, last_name), f"node {below.hex()} is not what is said of it")

    def read_file(self, size, digest, content):
        """The bytes of a file, piece by piece; their sum and hash are checked at the end."""
        is_short = len(content) > 1 and isinstance(content[1], list)
        layout = content[2 if is_short else 1 :]
        pieces = self._read_from(0, size, digest, content)
        if layout:
            (lengths,) = self.read_node(layout[0], 3)
            require(2 <= len(lengths) <= 2 * MAX_REGIONS + 1, "a layout of no regions, or too many")
            require(lengths[0] >= 0 and all(length > 0 for length in lengths[1:]), "an impossible layout")
            require(sum(lengths) == size != lengths[1], "the layout of a file does not fit its size")
            gaps = self._read_from(sum(lengths[1::2]), size, digest, content)
            pieces = alternate(lengths, gaps, pieces)
        whole, done = blake3(), 0
        for piece in pieces:
            done += len(piece)
            require(done <= size, "a file has more bytes than it should")
            whole.update(piece)
            yield piece
        require(done == size and whole.digest() == digest, "a file has another size or hash than it should")

    def _read_from(self, offset, size, digest, content):
        """What the chunks of a file hold from an offset on, chunk by chunk."""
        if not content:
            chunks = [(digest, size)] if size else []
        elif len(content) > 1 and isinstance(content[1], list):
            chunks = pair(*content[:2])
        else:
            chunks = self._read_list(content[0])
        for chunk, length in chunks:
            if offset < length:
                plain = self.read_chunk(chunk)
                require(len(plain) == length, "the chunks of a file do not fit its size")
                yield plain[offset:]
            offset = max(0, offset - length)

    def _read_list(self, node, above=None):
        level, (ids, lengths) = self.read_level(node, 2, above)
        for below, length in pair(ids, lengths):
            if level == 0:
                yield below, length
                continue
            total = 0
            for chunk in self._read_list(below, level):
                total += chunk[1]
                yield chunk
            require(total == length, f"node {below.hex()} is not what is said of it")


def pair(ids, lengths):
    """Ids that stand one after the other, with their lengths."""
    require(len(ids) == 32 * len(lengths), "a list of chunks has more ids than lengths, or fewer")
    require(all(length > 0 for length in lengths), "a list of chunks has an impossible length")
    return [(ids[32 * n : 32 * n + 32], length) for n, length in enumerate(lengths)]


def alternate(lengths, *sources):
    """As many bytes as each length says, from the pieces of the sources in turn."""
    rests = [b""] * len(sources)
    for position, length in enumerate(lengths):
        turn = position % len(sources)
        while length > 0:
            rest = rests[turn] or memoryview(next(sources[turn], b""))
            require(rest, "a file has fewer bytes than its layout says")
            yield rest[:length]
            rests[turn] = rest[length:]
            length -= min(length, len(rest))


def list_snapshots(repository):
    """One line a snapshot: its name, number of files, bytes, and whose it is."""
    for path in sorted(repository.root.glob("experiments/*.json")):
        if ID.fullmatch(path.stem):
            members = read_sealed(path)
            show_snapshot(path.stem, members, f"experiment {members['name'] or members['command']}")
    for path in sorted(repository.root.glob("checkpoints/*/*.json")):
        if ID.fullmatch(path.stem) and ID.fullmatch(path.parent.name):
            members = read_sealed(path)
            owner = f"checkpoint of {path.parent.name[:7]}, step {members['step']}"
            show_snapshot(f"{path.parent.name}/{path.stem}", members, owner)


def show_snapshot(name, members, owner):
    """A line, if files were saved."""
    snapshot = members.get("snapshot")
    if snapshot:
        size = f"{snapshot['files']} files, {snapshot['size_bytes']} bytes"
        print(f"{name}  {size:<30} {owner!a}")


def extract(repository, name, target):
    """Write a snapshot's files into a new directory."""
    experiment_id, _, checkpoint_id = name.partition("/")
    for part in filter(None, (experiment_id, checkpoint_id)):
        require(ID.fullmatch(part), f"not the name of a snapshot: {name}")
    prefix = "checkpoints" if checkpoint_id else "experiments"
    members = read_sealed(repository.root / prefix / f"{name}.json")
    require(members["id"] == (checkpoint_id or experiment_id), f"{prefix}/{name}.json is another record")
    snapshot = members.get("snapshot")
    require(snapshot, f"no files were saved with {name}")
    os.mkdir(target, 0o700)
    root = snapshot["root"]
    budget = snapshot["files"] + snapshot["directories"] + snapshot["symlinks"]
    # Directories get mode and time when all below is there; depth first, without recursion.
    finished = [(os.fsencode(target), root["mode"], *root["mtime"])]
    pending = [(os.fsencode(target), bytes.fromhex(root["node"]), 1)]
    while pending:
        directory, node, depth = pending.pop()
        require(depth <= MAX_DEPTH, "the tree is too deep")
        for name, kind, mode, seconds, nanoseconds, size, digest, content in repository.read_directory(node):
            budget -= 1
            require(budget >= 0, "the tree has more entries than its snapshot says")
            path = directory + b"/" + name
            if kind == DIRECTORY:
                os.mkdir(path, 0o700)
                pending.append((path, digest, depth + 1))
                finished.append((path, mode, seconds, nanoseconds))
                continue
            time = seconds * 10**9 + nanoseconds
            if kind == SYMLINK:
                require(blake3(content[0]).digest() == digest, "a link is damaged")
                os.symlink(content[0], path)
            else:
                require(kind == FILE, f"an entry of the unknown type {kind}")
                with open(path, "xb") as file:
                    for plain in repository.read_file(size, digest, content):
                        file.write(plain)
                    os.chmod(file.fileno(), mode & 0o777)
            os.utime(path, ns=(time, time), follow_symlinks=False)
    for path, mode, seconds, nanoseconds in reversed(finished):
        os.chmod(path, mode & 0o777)
        os.utime(path, ns=(seconds * 10**9 + nanoseconds,) * 2)


def main(arguments):
    try:
        if len(arguments) == 2 and arguments[1] == "list":
            list_snapshots(Repository(arguments[0]))
        elif len(arguments) == 4 and arguments[1] == "extract":
            extract(Repository(arguments[0]), *arguments[2:])
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except (Damaged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, KeyError, struct.error, zstandard.ZstdError) as error:
        print(f"error: the repository is damaged: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
