"""`repository.json`: what kind of repository this is, and how it cuts files."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from replicate.records import format_time
from replicated.chunk.cdc import ALGORITHM, NORMALIZATION, ChunkerParameters, ChunkSizes
from replicated.format.canonical import Malformed, NewerFormat, seal, unseal
from replicated.format.members import Members

#: Version of the layout of a repository as a whole.
FORMAT_VERSION: Final = 1
#: Features without which a repository cannot be read rightly; none so far.
KNOWN_FEATURES: Final[frozenset[str]] = frozenset()

_SEED = 0


@dataclass(frozen=True, slots=True)
class RepositorySettings:
    """What is decided when a repository is made, for ever."""

    id: str
    created: datetime
    chunker: ChunkerParameters = field(default_factory=ChunkerParameters)


def encode_settings(settings: RepositorySettings) -> bytes:
    """`repository.json`."""
    chunker = settings.chunker
    return seal(
        {
            "format": FORMAT_VERSION,
            "id": settings.id,
            "created": format_time(settings.created),
            "features": [],
            "chunker": {
                "algorithm": ALGORITHM,
                "normalization": NORMALIZATION,
                "seed": _SEED,
                "whole_below": chunker.whole_below,
                "text": _encode_sizes(chunker.text),
                "binary": _encode_sizes(chunker.binary),
            },
        }
    )


def decode_settings(data: bytes) -> RepositorySettings:
    """What `encode_settings` wrote; raises `Malformed`, and `NewerFormat` for what must not be read."""
    members = Members(unseal(data))
    version = members.natural("format")
    if version > FORMAT_VERSION:
        raise NewerFormat(f"format {version}")
    unknown = [name for name in members.strings("features") if name not in KNOWN_FEATURES]
    if unknown:
        raise NewerFormat(f"the features {', '.join(unknown)}")
    chunker = members.object("chunker")
    algorithm = (chunker.get("algorithm", str), chunker.natural("normalization"), chunker.natural("seed"))
    if algorithm != (ALGORITHM, NORMALIZATION, _SEED):
        raise NewerFormat(f"the chunker {algorithm[0]!r} with level {algorithm[1]}, seed {algorithm[2]}")
    parameters = ChunkerParameters(
        whole_below=chunker.natural("whole_below"),
        text=_decode_sizes(chunker.object("text")),
        binary=_decode_sizes(chunker.object("binary")),
    )
    if not parameters.is_valid():
        raise Malformed("the sizes of chunks are impossible")
    return RepositorySettings(members.id("id"), members.time("created"), parameters)


def _encode_sizes(sizes: ChunkSizes) -> dict[str, Any]:
    return {"minimum": sizes.minimum, "average": sizes.average, "maximum": sizes.maximum}


def _decode_sizes(members: Members) -> ChunkSizes:
    return ChunkSizes(members.natural("minimum"), members.natural("average"), members.natural("maximum"))
