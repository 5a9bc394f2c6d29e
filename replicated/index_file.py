"""The database file of an index: its tables, and the longer statements.

What is put in and taken out is the matter of `index`, which is the only one to use this.
"""

from __future__ import annotations

from typing import Final

#: "RPLX".
APPLICATION_ID: Final = 0x52504C58
SCHEMA_VERSION: Final = 7

SCHEMA = """
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    name BLOB NOT NULL UNIQUE,
    -- As in KnownPack.
    size INTEGER NOT NULL DEFAULT 0,
    base_count INTEGER NOT NULL DEFAULT 0,
    -- Then it may be read as long as it is there, but nothing new may rely on it.
    is_condemned INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE bases (
    number INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE
);
CREATE TABLE chunks (
    id BLOB PRIMARY KEY,
    pack INTEGER NOT NULL,
    -- As in format.pack.Record.
    offset INTEGER NOT NULL,
    stored_length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL,
    codec INTEGER NOT NULL,
    -- A number in `bases`; 0: the chunk stands on its own.
    base INTEGER NOT NULL
) WITHOUT ROWID;
-- The index objects whose records are all in `chunks`, but for those of packs that are gone.
CREATE TABLE objects (
    name TEXT PRIMARY KEY,
    -- Not yet where it was written by this machine and no listing has shown it.
    is_listed INTEGER NOT NULL
) WITHOUT ROWID;
-- Which index objects list a pack: it is known as long as there is one.
CREATE TABLE listings (
    pack INTEGER NOT NULL,
    object TEXT NOT NULL,
    PRIMARY KEY (pack, object)
) WITHOUT ROWID;
CREATE INDEX listings_by_object ON listings (object);
-- The lists of condemned packs that were taken in, and the packs.
CREATE TABLE condemned (
    name TEXT PRIMARY KEY
) WITHOUT ROWID;
CREATE TABLE condemned_packs (
    name BLOB PRIMARY KEY,
    -- As in metadata.Condemned.
    is_final INTEGER NOT NULL
) WITHOUT ROWID;
-- One row, as in Index.generation.
CREATE TABLE identity (
    generation INTEGER NOT NULL
);
INSERT INTO identity VALUES (random());
"""

# Rows for `chunks`, in any order, of index objects that are being taken in.
INCOMING = """
CREATE TEMP TABLE incoming (
    id BLOB NOT NULL,
    pack INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    stored_length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL,
    codec INTEGER NOT NULL,
    base INTEGER NOT NULL
)
"""
# In the order of the table, so that each of its pages is written once. Of two places the one without a base
# is kept: it can be read alone, and so two deltas of each other, in two packs, never wait for one another.
# Of two such places the one in a pack that is not condemned is kept. (`WHERE true` tells the parser that ON
# begins no join.)
MERGE = """
INSERT INTO chunks SELECT * FROM incoming WHERE true ORDER BY id
ON CONFLICT (id) DO UPDATE SET
    pack = excluded.pack,
    offset = excluded.offset,
    stored_length = excluded.stored_length,
    plain_length = excluded.plain_length,
    codec = excluded.codec,
    base = excluded.base
WHERE (excluded.base != 0, (SELECT is_condemned FROM packs WHERE number = excluded.pack))
    < (base != 0, (SELECT is_condemned FROM packs WHERE number = chunks.pack))
"""
# A delta is worth nothing without its base, and what is condemned nothing to who writes.
RELIABLE = """
SELECT chunks.id FROM chunks JOIN packs ON packs.number = chunks.pack
WHERE chunks.id IN ({marks}) AND NOT packs.is_condemned AND (base = 0 OR EXISTS (
    SELECT 1 FROM bases
    JOIN chunks AS other ON other.id = bases.id
    JOIN packs AS others ON others.number = other.pack
    WHERE bases.number = chunks.base AND other.base = 0 AND NOT others.is_condemned
))
"""
USABLE_BASES = """
SELECT chunks.id FROM chunks JOIN packs ON packs.number = chunks.pack
WHERE chunks.id IN ({marks}) AND base = 0 AND NOT packs.is_condemned
"""
