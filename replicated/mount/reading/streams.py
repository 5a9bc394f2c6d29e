"""One file that is being read from the repository: exactly what is asked for, and early what will be.

`open_files` has one for each file that is read; `windows` guesses, `supply` fetches. May be used from several
threads. Invariant: a read gives all bytes that were asked for, or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final

from replicate.errors import RepositoryDamaged
from replicated.file_reader import Part, Piece, chunks_of
from replicated.mount.reading.supply import ChunkSupply, Fetcher, Share
from replicated.mount.reading.windows import Guess, ReadPattern

#: The most that is read ahead of one reader.
NEAR_WINDOW_BYTES: Final = 8 << 20
FAR_WINDOW_BYTES: Final = 32 << 20
#: What formats keep at their ends: headers of safetensors, directories of zip files, footers of Parquet.
END_BYTES: Final = 64 << 10
#: One system call takes no more than 1024 parts.
MAX_PARTS: Final = 512


class Stream:
    """The bytes of a file of `size_bytes`."""

    def __init__(self, fetcher: Fetcher, size_bytes: int, supply: ChunkSupply, *, is_near: bool) -> None:
        self._fetcher = fetcher
        self._size_bytes = size_bytes
        self._supply = supply
        self._share = Share()
        # Guards the pattern; a leaf.
        self._lock = threading.Lock()
        self._pattern = ReadPattern(size_bytes, NEAR_WINDOW_BYTES if is_near else FAR_WINDOW_BYTES)

    def begin_ends(self) -> None:
        """Have the first and the last chunk fetched soon: whoever opens a file looks there first.

        To be called by a thread that nobody waits for.
        """
        for offset in (0, max(0, self._size_bytes - END_BYTES)):
            self._supply.begin(self._share, self._fetcher, offset, END_BYTES)

    def guess(self, offset: int, length: int) -> Guess:
        """What the next `read` means; to be asked for before each."""
        room_bytes = self._supply.room(self._share)
        with self._lock:
            return self._pattern.follow(offset, length, room_bytes)

    def read(self, offset: int, length: int, guess: Guess) -> Sequence[Part]:
        """`length` bytes from `offset`, which the file has, in parts."""
        if guess.start < guess.end:
            self._supply.do_soon(partial(self._read_ahead, guess))
        parts = read_parts(
            self._fetcher.iter_pieces(offset, length), partial(self._supply.get, self._fetcher)
        )
        if sum(map(len, parts)) != length:
            raise RepositoryDamaged(f"the chunks of a file do not have the {length} bytes at offset {offset}")
        return parts

    def _read_ahead(self, guess: Guess) -> None:
        # The reader may be faster than the threads that read ahead: what it has read is fetched already.
        start = max(guess.start, guess.cursor.position)
        if start < guess.end:
            self._supply.begin(self._share, self._fetcher, start, guess.end - start)

    def close(self) -> None:
        """Nobody reads on: what was read ahead is needed no more; may be called twice."""
        self._supply.end(self._share)


def read_parts(
    pieces: Iterator[Piece], fetch: Callable[[Mapping[bytes, int]], Mapping[bytes, bytes]]
) -> Sequence[Part]:
    """The bytes that lie at `pieces`, in at most `MAX_PARTS` parts; `fetch` gives chunks by their lengths.

    A repository may say that each byte of a file is a chunk: few pieces are in memory at once.
    """
    parts = _cut(list(islice(pieces, MAX_PARTS)), fetch)
    if len(parts) < MAX_PARTS:
        return parts
    joined = [b"".join(parts)]
    while group := list(islice(pieces, MAX_PARTS)):
        joined.append(b"".join(_cut(group, fetch)))
    return parts if len(joined) == 1 else [b"".join(joined)]


def _cut(
    pieces: Sequence[Piece], fetch: Callable[[Mapping[bytes, int]], Mapping[bytes, bytes]]
) -> list[Part]:
    chunks = fetch(chunks_of(pieces))
    return [piece.cut(chunks[piece.chunk_id]) for piece in pieces]
