"""What one series of checkpoints is stored as: which tensors as differences, and to which chunks.

The chunks that differences are taken to were stored on their own: the keyframe. Because reading must never
need more than one other chunk, all differences are to the keyframe, and they grow with its age. So from
time to time a tensor is stored on its own again: after a difference that took more than its checkpoints
have taken on average since the keyframe, that one included. For steady training no other moment would be
better. Tensors without resemblance (Adam's first moments) are not even tried at most times. Each tensor
has its own keyframe. Nothing here does I/O or keeps time; `keyframes` keeps the states.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from replicated.chunk.codec import DELTA, HASH_BYTES
from replicated.chunk.tensor import PIECE_BYTES
from replicated.packer import Stored

#: A tensor whose differences gain nothing is left alone for 1, 2, 4 and at last so many checkpoints.
MAX_ALONE: Final = 8

# Of a state: the number of tensors, each tensor, the base of each piece; zeros where there is none.
_COUNT = struct.Struct("<I")
_TENSOR = struct.Struct("<QdHBB")
_NO_BASE = bytes(HASH_BYTES)
_MAX_COUNT = 0xFFFF
# A file of which less than this was refused resembles the one before, and be it in one small tensor.
_MAX_REFUSED_SHARE = 0.98


@dataclass(slots=True)
class _Tensor:
    """A region of a layout in successive checkpoints; those in which nothing of it is new do not count."""

    size: int
    #: Stored bytes in relation to plain ones, summed over the checkpoints since the keyframe, with that one.
    taken: float = 0.0
    #: Those checkpoints; 0 when nothing of it was stored yet, and its bases, if any, are other people's.
    checkpoints: int = 0
    #: Differences to be made that gained nothing, since one that did.
    failures: int = 0
    #: In so many of the next checkpoints it is stored on its own.
    alone: int = 0

    @property
    def pieces(self) -> int:
        return -(-self.size // PIECE_BYTES)

    def settle(self, new: _New) -> None:
        """Take in what became of it in one checkpoint."""
        if not new.plain_bytes:
            return
        ratio = new.stored_bytes / new.plain_bytes
        has_failed = new.refused_bytes * 2 > new.offered_bytes
        if new.offered_bytes and not has_failed:
            self.failures = 0
            self.taken += ratio
            self.checkpoints = min(self.checkpoints + 1, _MAX_COUNT)
            self.alone = int(ratio * self.checkpoints > self.taken)
            return
        if not new.offered_bytes:
            self.alone = max(0, self.alone - 1)
        elif self.checkpoints:
            # The first time may be chance: a restart, or a file that is not what its name seemed to say.
            self.alone = min(1 << self.failures >> 1, MAX_ALONE)
            self.failures = min(self.failures + 1, MAX_ALONE)
        self.taken = ratio
        self.checkpoints = 1


@dataclass(slots=True)
class _New:
    """Those bytes of a tensor in one checkpoint that the repository did not have."""

    plain_bytes: int = 0
    stored_bytes: int = 0
    #: Plain bytes for which there was a base; and of those, what was not stored as a difference to it.
    offered_bytes: int = 0
    refused_bytes: int = 0


class State(NamedTuple):
    """What a series has come to with a checkpoint."""

    tensors: list[_Tensor]
    #: The bases of all pieces, one after the other; zeros where there is none.
    bases: bytes

    @classmethod
    def unpack(cls, packed: bytes) -> State:
        """From what `Series` has packed; raises `ValueError`."""
        try:
            (count,) = _COUNT.unpack_from(packed)
            end = _COUNT.size + _TENSOR.size * count
            tensors = [_Tensor(*fields) for fields in _TENSOR.iter_unpack(packed[_COUNT.size : end])]
        except struct.error as error:
            raise ValueError(f"not a state: {error}") from error
        bases = packed[end:]
        if len(tensors) != count or len(bases) != HASH_BYTES * sum(tensor.pieces for tensor in tensors):
            raise ValueError("not a state: its length")
        return cls(tensors, bases)


class Series:
    """The `Bases` of one file: what its series did before, and what becomes of it with this checkpoint."""

    def __init__(
        self, sizes: Sequence[int], before: State | None, on_complete: Callable[[bytes, bool], None]
    ) -> None:
        """`sizes` are those of the layout's regions, `before` is the state after the checkpoint before.

        `before` may be that of a file with other tensors at some places, and is used up. Once the last
        piece was noted, `on_complete` gets the state after this one, packed, and whether the file resembled
        the one before at all.
        """
        self._on_complete = on_complete
        self._tensors = [_Tensor(size) for size in sizes]
        self._bases = bytearray(HASH_BYTES * sum(tensor.pieces for tensor in self._tensors))
        if before is not None:
            self._go_on(before)
        #: The bases as they were, without those of tensors that are to be stored on their own.
        self._offered = bytearray(self._bases)
        start = 0
        for tensor in self._tensors:
            end = start + HASH_BYTES * tensor.pieces
            if tensor.alone:
                self._offered[start:end] = bytes(end - start)
            start = end
        # The tensor that the next piece belongs to, and what is known of it.
        self._number = 0
        self._pieces_left = self._tensors[0].pieces
        self._new = _New()
        # Of the tensors before it.
        self._offered_bytes = 0
        self._refused_bytes = 0

    def base_of(self, piece: int) -> bytes:
        """The chunk that a piece is to be stored as a difference to; b"" to store it on its own."""
        base = bytes(_at(self._offered, piece))
        return b"" if base == _NO_BASE else base

    def note(self, piece: int, chunk_id: bytes, stored: Stored | None) -> None:
        """What became of a piece, once each and in order; None: the repository had the chunk."""
        base = _at(self._bases, piece)
        if stored is None:
            # It may be a difference itself; then it is of no use to the next checkpoint, but does no harm.
            if base == _NO_BASE:
                base[:] = chunk_id
        else:
            new = self._new
            new.plain_bytes += stored.plain_length
            new.stored_bytes += stored.stored_length
            is_offered = self.base_of(piece) != b""
            new.offered_bytes += stored.plain_length if is_offered else 0
            if stored.codec != DELTA:
                new.refused_bytes += stored.plain_length if is_offered else 0
                base[:] = chunk_id
        base.release()
        self._pieces_left -= 1
        if not self._pieces_left:
            self._end_tensor()

    def _end_tensor(self) -> None:
        self._tensors[self._number].settle(self._new)
        self._offered_bytes += self._new.offered_bytes
        self._refused_bytes += self._new.refused_bytes
        self._new = _New()
        self._number += 1
        if self._number < len(self._tensors):
            self._pieces_left = self._tensors[self._number].pieces
        else:
            is_alike = self._refused_bytes <= self._offered_bytes * _MAX_REFUSED_SHARE
            self._on_complete(self._pack(), is_alike)

    def _go_on(self, before: State) -> None:
        """Go on with the tensors at the beginning and at the end that are the same in both checkpoints.

        What differs lies between them: the record of a training that is stored with its weights, or the
        last layer of a model, which is made anew for another task.
        """
        mine, (tensors, bases) = self._tensors, before
        limit = min(len(mine), len(tensors))
        first = _count_equal(mine, tensors, limit)
        last = _count_equal(mine[::-1], tensors[::-1], limit - first)
        length = HASH_BYTES * sum(tensor.pieces for tensor in tensors[:first])
        self._bases[:length] = bases[:length]
        mine[:first] = tensors[:first]
        if last:
            length = HASH_BYTES * sum(tensor.pieces for tensor in tensors[-last:])
            self._bases[-length:] = bases[-length:]
            mine[-last:] = tensors[-last:]

    def _pack(self) -> bytes:
        tensors = [
            _TENSOR.pack(tensor.size, tensor.taken, tensor.checkpoints, tensor.failures, tensor.alone)
            for tensor in self._tensors
        ]
        return b"".join([_COUNT.pack(len(tensors)), *tensors, self._bases])


def _at(bases: bytearray, piece: int) -> memoryview:
    return memoryview(bases)[HASH_BYTES * piece : HASH_BYTES * (piece + 1)]


def _count_equal(ours: Sequence[_Tensor], theirs: Sequence[_Tensor], limit: int) -> int:
    """How many tensors have the same sizes before the first that has not."""
    for number in range(limit):
        if ours[number].size != theirs[number].size:
            return number
    return limit
