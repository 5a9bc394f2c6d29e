"""A gathered content goes through the tree cache and back, and is known only with its layout."""

import pytest
from blake3 import blake3

from replicated.format.manifest import FileContent
from replicated.snapshot.entries import KNOWN, Row, pack_sources, unpack_sources
from replicated.snapshot.ingest import _known_content
from replicated.snapshot.remembered import _source_of

HASH = blake3(b"content").digest()
LAYOUT = blake3(b"layout").digest()


@pytest.mark.parametrize(
    "content",
    [
        FileContent(9, HASH, HASH * 2, (4, 5), layout=LAYOUT),
        FileContent(9, HASH, HASH, (9,), layout=LAYOUT),
        FileContent(10**10, HASH, node=HASH, layout=LAYOUT),
    ],
)
def test_what_is_remembered_of_a_gathered_file_is_its_content(content: FileContent) -> None:
    (source,) = unpack_sources(pack_sources([_source_of(content)]))
    assert source[0] == KNOWN
    row = Row(b"model.pt", 0o100644, 1, content.size, 0, 0)
    assert _known_content(row, source) == content
    assert source == _source_of(content), "sources are compared with those of the cache"
    other = content._replace(layout=HASH)
    assert _source_of(other) != source
