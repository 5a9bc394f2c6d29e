"""What goes wrong, as the errors that libraries for data understand: always an `OSError`.

Invariant: what is damaged or out of reach is never said to be missing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from replicate.errors import (
    Ambiguous,
    ConfigError,
    InvalidArgument,
    NotFound,
    NotStored,
    ReplicateError,
    RepositoryDamaged,
    RepositoryIncompatible,
    RepositoryMissing,
)
from replicated.fsspec_files.forking import gate

#: The first that fits counts. What is out of reach is none of them.
_NUMBERS: tuple[tuple[type[ReplicateError], int], ...] = (
    (Ambiguous, errno.ENOTUNIQ),
    (NotFound, errno.ENOENT),
    (NotStored, errno.ENOENT),
    (InvalidArgument, errno.ENOENT),
    (RepositoryMissing, errno.ENOENT),
    (ConfigError, errno.EINVAL),
    (RepositoryDamaged, errno.EIO),
    (RepositoryIncompatible, errno.EOPNOTSUPP),
)
_REFUSED = (errno.EACCES, errno.EPERM)


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Within, a repository is used: errors of this project become an `OSError` that names `path`."""
    try:
        with gate.passing():
            yield
    except ReplicateError as error:
        raise as_os_error(error, path) from error


def as_os_error(error: ReplicateError, path: str) -> OSError:
    """The `OSError` that says the same of `path`."""
    return OSError(_number(error), str(error), path)


def refuse(path: object) -> NoReturn:
    """Raise what every attempt to write gets."""
    name = path if isinstance(path, str) else repr(path)
    raise OSError(
        errno.EROFS, "snapshots are read-only; save files with replicate.init() or checkpoint()", name
    )


def _number(error: ReplicateError) -> int:
    for kind, number in _NUMBERS:
        if isinstance(error, kind):
            return number
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return cause.errno
        if _is_refusal(cause):
            return errno.EACCES
        cause = cause.__cause__
    return errno.EHOSTUNREACH


def _is_refusal(cause: BaseException) -> bool:
    """Whether a library of a cloud says that we may not; told by its shape, so that none is imported."""
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(cause, "code", None)
    return status in (401, 403)


def is_missing(error: OSError) -> bool:
    """Whether it says that there is nothing of a name, and not that this cannot be known."""
    return isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == errno.ELOOP


def no_file(why: str, path: str) -> FileNotFoundError:
    """There is nothing at a path."""
    return FileNotFoundError(errno.ENOENT, why, path)


def text_of(name: bytes) -> str:
    """A name or path as fsspec has it; what is no UTF-8 becomes surrogates."""
    return os.fsdecode(name)
