"""Which packs nothing needs: decided from the sections of index objects alone, without I/O.

A chunk is *needed* when a snapshot refers to it, or when a needed chunk is stored as a difference to it; then
it has to stay somewhere without a base. A condemned pack may go when all that is needed of it lies in packs
that nobody has condemned: of two collectors that condemn a copy each, neither may count on the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from replicated.chunk.codec import HASH_BYTES
from replicated.format.listing import SECTION, Section
from replicated.format.pack import RECORD, split_shared
from replicated.idset import IdSet

#: Gives all sections, as often as it is called; a pack may be in several.
Sections = Callable[[], Iterable[Section]]


class Ids(Protocol):
    """Ids of chunks or packs, as a set or `IdSet` is."""

    def __contains__(self, identifier: bytes, /) -> bool:
        """Whether it is among them."""
        ...


class Place(NamedTuple):
    """One chunk of a section."""

    chunk_id: bytes
    stored_length: int
    #: Empty: it stands on its own.
    base: bytes


@dataclass(slots=True)
class Needs:
    """What snapshots refer to."""

    #: By those that readers can see.
    committed: IdSet = field(default_factory=IdSet)
    #: By those that are only announced.
    pending: IdSet = field(default_factory=IdSet)

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self.committed or chunk_id in self.pending


@dataclass(slots=True)
class Survey:
    """What a look at all packs has found."""

    #: Packs that hold nothing that is needed, and are not condemned.
    useless: set[bytes] = field(default_factory=set)
    #: All packs that index objects list.
    listed: set[bytes] = field(default_factory=set)
    #: How many chunks of committed snapshots are in no pack that could be read.
    missing_count: int = 0
    #: What packs that stay hold besides what is needed.
    unneeded_bytes: int = 0


def places(section: Section) -> Iterator[Place]:
    """The chunks of a section."""
    middle = SECTION.size + section.record_count * RECORD.size
    bases = section.data[middle:]
    for chunk_id, _, stored_length, _, shared in RECORD.iter_unpack(section.data[SECTION.size : middle]):
        number = split_shared(shared)[1]
        base = bytes(bases[(number - 1) * HASH_BYTES : number * HASH_BYTES]) if number else b""
        yield Place(chunk_id, stored_length, base)


def find_bases(sections: Sections, needs: Ids, condemned: Ids) -> IdSet:
    """What chunks that are needed are stored as differences to, in packs that are not condemned."""
    bases = IdSet()
    for section in sections():
        if section.base_count and section.name not in condemned:
            for place in places(section):
                if place.base and place.chunk_id in needs:
                    bases.add(place.base)
    return bases


def survey(sections: Sections, needs: Needs, condemned: Ids) -> Survey:
    """Look at all packs once."""
    result = Survey()
    bases = find_bases(sections, needs, condemned)
    found = IdSet()
    for section in sections():
        if section.name in result.listed:
            continue
        result.listed.add(section.name)
        is_needed, unneeded_bytes = False, 0
        for place in places(section):
            if place.chunk_id in needs.committed:
                found.add(place.chunk_id)
            elif place.chunk_id not in needs.pending and place.chunk_id not in bases:
                unneeded_bytes += place.stored_length
                continue
            is_needed = True
        if is_needed or section.name in condemned:
            result.unneeded_bytes += unneeded_bytes
        else:
            result.useless.add(section.name)
    result.missing_count = len(needs.committed) - len(found)
    return result


def find_survivors(
    sections: Sections,
    needs: Ids,
    condemned: Ids,
    candidates: Ids,
    existing: Ids,
) -> set[bytes]:
    """Those of the candidates that have to stay.

    `condemned`: by anybody, the candidates among them. `existing`: packs that are known to be in the store.
    """
    wanted = _Wanted(find_bases(sections, needs, condemned), needs)
    while wanted.look(sections, candidates, condemned, existing):
        pass
    return wanted.survivors(candidates)


class _Wanted:
    """The chunks that are needed of the candidates, and where else they are."""

    def __init__(self, bases: IdSet, needs: Ids) -> None:
        self._bases = bases
        self._needs = needs
        #: By chunk, its places in candidates: pack and base.
        self._going: dict[bytes, set[tuple[bytes, bytes]]] = {}
        #: Chunks that stay without a base, and the bases to which others stay as differences.
        self._plain: set[bytes] = set()
        self._deltas: dict[bytes, set[bytes]] = {}
        #: Bases of those that only candidates have, or of differences that stay.
        self._also: set[bytes] = set()

    def look(
        self,
        sections: Sections,
        candidates: Ids,
        condemned: Ids,
        existing: Ids,
    ) -> bool:
        """Look at all packs; whether more chunks came up that have to be looked for."""
        known = len(self._also)
        for section in sections():
            if section.name in candidates:
                for place in places(section):
                    if self._is_wanted(place.chunk_id):
                        self._going.setdefault(place.chunk_id, set()).add((section.name, place.base))
        if not self._going:
            return False
        for section in sections():
            if section.name in condemned or section.name not in existing:
                continue
            for place in places(section):
                if place.chunk_id in self._going or place.chunk_id in self._also:
                    if place.base:
                        self._deltas.setdefault(place.chunk_id, set()).add(place.base)
                    else:
                        self._plain.add(place.chunk_id)
        for chunk_id, going in self._going.items():
            if chunk_id not in self._plain:
                self._also.update(base for _, base in going if base)
                self._also.update(self._deltas.get(chunk_id, ()))
        return len(self._also) > known

    def survivors(self, candidates: Ids) -> set[bytes]:
        """The packs without which something could not be read any more."""
        kept: set[bytes] = set()
        for chunk_id, going in self._going.items():
            if chunk_id in self._plain:
                continue
            if chunk_id in self._bases:
                kept.update(pack for pack, base in going if not base)
            if chunk_id in self._needs and not self._deltas.get(chunk_id, set()) & self._plain:
                kept.update(pack for pack, _ in going)
                for base in {base for _, base in going if base} - self._plain:
                    kept.update(pack for pack, other in self._going.get(base, ()) if not other)
        return kept

    def _is_wanted(self, chunk_id: bytes) -> bool:
        return chunk_id in self._needs or chunk_id in self._bases or chunk_id in self._also
