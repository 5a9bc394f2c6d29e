"""Sizes and rates as people write them: `20GB`, `512MiB`, `50MB/s`, `1000000`. Pure functions.

Used by `config` and the command line. Writing sizes is the affair of `phrases`.
"""

from __future__ import annotations

import re
from fractions import Fraction

#: What is larger than this is a mistake, and would not fit into the requests to the daemon.
MAX_BYTES = 2**62

_PREFIXES = ("", "k", "m", "g", "t", "p", "e")
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgtpe]?)(i?)(b?)", re.IGNORECASE | re.ASCII)
_PER_SECOND = ("/s", "/sec", "/second")


def parse_size(text: str) -> int:
    """A size in bytes, at least 1; raises `ValueError` saying what is wrong with it.

    `GB` and `G` are powers of 1000, `GiB` and `Gi` of 1024; upper and lower case are the same.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"not a size such as 20GB, 512MiB or 1000000: {text!r}")
    factor = (1024 if match[3] else 1000) ** _PREFIXES.index(match[2].lower())
    size_bytes = int(Fraction(match[1]) * factor)
    if not 1 <= size_bytes <= MAX_BYTES:
        raise ValueError(f"must be from 1 byte to {MAX_BYTES // 10**15} PB: {text!r}")
    return size_bytes


def parse_rate(text: str) -> int:
    """Bytes a second, at least 1; a size, with or without `/s`. Raises `ValueError`."""
    stripped = text.strip()
    lower = stripped.lower()
    ending = next((ending for ending in _PER_SECOND if lower.endswith(ending)), "")
    try:
        return parse_size(stripped.removesuffix(stripped[len(stripped) - len(ending) :]))
    except ValueError as error:
        problem = str(error).replace("not a size such as 20GB, 512MiB or", "not a rate such as 50MB/s or")
        raise ValueError(problem.rpartition(": ")[0] + f": {text!r}") from None
