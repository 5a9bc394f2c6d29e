"""`replicate://ID/path`: the files of snapshots for whatever reads through fsspec, without mount or daemon.

They are read from the repository itself, so it works on any machine that reaches that one.
"""

from replicated.fsspec_files.filesystem import ReplicateFileSystem

__all__ = ["ReplicateFileSystem"]
