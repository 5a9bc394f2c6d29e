"""The lines in which two versions of a file differ (`diff --content`).

Pure functions over bytes. Text that is not UTF-8 stays readable: bytes are compared, and what cannot be
printed is escaped.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator

from replicate.phrases import escape

#: Larger files are not compared line by line: difflib is quadratic at its worst.
MAX_CONTENT_BYTES = 1 << 20
#: A NUL in the beginning of a file means that it is no text, as for Git.
_PROBE_BYTES = 8000


def is_binary(content: bytes) -> bool:
    """Whether content is not text."""
    return b"\0" in content[:_PROBE_BYTES]


def unified_diff(path: str, left: bytes | None, right: bytes | None) -> Iterator[str]:
    """Lines of a unified diff, safe to print and without line ends; None stands for an absent file."""
    lines = difflib.diff_bytes(
        difflib.unified_diff,
        io.BytesIO(left or b"").readlines(),
        io.BytesIO(right or b"").readlines(),
        b"/dev/null" if left is None else b"a/" + path.encode(errors="surrogateescape"),
        b"/dev/null" if right is None else b"b/" + path.encode(errors="surrogateescape"),
    )
    for line in lines:
        text = line.decode(errors="surrogateescape").removesuffix("\n")
        yield "\t".join(escape(part) for part in text.split("\t"))
        if not line.endswith(b"\n"):
            yield "\\ No newline at end of file"
