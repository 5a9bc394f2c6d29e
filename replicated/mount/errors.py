"""Errors of a mount as numbers: the one table that turns what was raised into an errno."""

from __future__ import annotations

import errno
import logging
import os

from replicate.errors import RepositoryDamaged

_LOG = logging.getLogger(__name__)


class Refused(Exception):
    """The operation cannot be done, for the reason that `errno` names."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def errno_for(error: BaseException, operation: str) -> int:
    """The errno that a caller of `operation` is given for `error`.

    Only a `Refused` says more than EIO. In particular an `OSError` from the store does not come
    through: ENOENT for a missing pack would read as "no such file".
    """
    if isinstance(error, Refused):
        return error.errno
    _LOG.error("%s failed: %s", operation, error, exc_info=_unless_expected(error))
    return errno.EIO


def _unless_expected(error: BaseException) -> BaseException | None:
    return None if isinstance(error, RepositoryDamaged) else error
