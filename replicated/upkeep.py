"""What is done for a repository after something was stored there, so that it stays quick to open.

Called by `jobs` in the thread of a worker. Nothing depends on it: what fails is done after a later job.
"""

from __future__ import annotations

import logging

from replicate.errors import ReplicateError
from replicated.compaction import compact
from replicated.record_merging import merge_records
from replicated.repository import Repository

_log = logging.getLogger(__name__)


def keep_up(repository: Repository | None) -> None:
    """Merge what has become many small objects, if it is worth it and nobody else does it."""
    if repository is None:
        return
    try:
        compact(repository.store, repository.log, repository.index)
        if repository.store.capabilities.has_costly_requests:
            merge_records(repository)
    except ReplicateError as error:
        _log.info("objects of %s are not merged now: %s", repository.url, error)
