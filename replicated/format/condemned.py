"""Lists of packs that a collector deletes, as JSON objects of a repository, and back.

See "Collecting" in docs/format.md: who writes must not begin to rely on a pack that is in one of them; who
reads may use it until it is in one that is final.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from replicate.ids import is_id
from replicate.records import format_time
from replicated.format.canonical import Malformed, NewerFormat, seal, unseal
from replicated.format.members import Members
from replicated.format.metadata import RECORD_VERSION


@dataclass(frozen=True, slots=True)
class Condemned:
    """Packs that a collector wants to delete: nobody may begin to rely on them."""

    packs: frozenset[bytes]
    #: That nothing needs them has been made sure since: they are being deleted, or are gone.
    is_final: bool = False


def encode_condemned(condemned: Condemned, at: datetime, host: str) -> bytes:
    """`log/condemned/<64 hex>`."""
    return seal(
        {
            "format": RECORD_VERSION,
            "condemned": format_time(at),
            "final": condemned.is_final,
            "host": host,
            "packs": sorted(name.hex() for name in condemned.packs),
        }
    )


def decode_condemned(data: bytes) -> Condemned:
    """What `encode_condemned` wrote; raises `Malformed`, `NewerFormat`."""
    members = Members(unseal(data))
    version = members.natural("format")
    if version > RECORD_VERSION:
        raise NewerFormat(f"a record of format {version}")
    members.time("condemned")
    members.get("host", str, "")
    names = members.strings("packs")
    if not all(is_id(name) for name in names):
        raise Malformed("member 'packs' holds something that is not the name of a pack")
    return Condemned(frozenset(map(bytes.fromhex, names)), members.get("final", bool, False))
