"""The one tree of errors, shared by the library, the command line and the daemon.

An error says what happened to what, why, and what to do next (`hint`). Each class has a stable `code`
(sent over the wire and never reused), the exit status of the command line, and whether a retry can
help. The class that is raised in the daemon is the class that arrives in the client: `wire` carries
`code`, message, hint and `fields`, and `from_code` makes the same class again.

    ReplicateError
    ├── InvalidArgument (ValueError)      exit 2   a value given by the user cannot be used
    ├── ConfigError                       exit 1   replicate.yaml, environment
    ├── NotFound (LookupError)            exit 1   no experiment, checkpoint or file of that name
    │   └── Ambiguous                     exit 1   more than one
    ├── PathMissing                       exit 1   a path to save does not exist
    ├── CaptureFailed                     exit 1   a file could not be frozen as it was
    │   └── ChangedWhileReading           exit 1
    ├── NotStored                         exit 1   the snapshot is not, or never will be, in the repository
    ├── CheckoutConflict                  exit 1   files are in the way
    ├── CheckoutFailed                    exit 1   a file could not be written
    ├── MountFailed                       exit 1
    ├── RepositoryError                   exit 1
    │   ├── RepositoryUnreachable         exit 3   retry helps
    │   │   └── RepositoryMissing         exit 3   nothing there
    │   ├── RepositoryFull                exit 1   retry helps once there is space
    │   ├── RepositoryDamaged             exit 1
    │   └── RepositoryIncompatible        exit 1
    ├── StateUnwritable                   exit 1   the daemon's own state; retry helps once there is space
    ├── DaemonUnavailable                 exit 3   retry helps
    │   └── DaemonIncompatible            exit 3
    └── InternalError                     exit 1   our bug
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ReplicateError(Exception):
    """Base of every error that this project raises on purpose; catch it to catch them all.

    `message` is one sentence without a full stop, `hint` says what to do next (or is empty), `fields`
    holds the values that the message speaks of, as strings.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields: dict[str, str] = dict(fields or {})

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidArgument(ReplicateError, ValueError):
    """A value that the user gave cannot be used."""

    code = "invalid_argument"
    exit_status = 2


class ConfigError(ReplicateError):
    """The configuration file or an environment variable is wrong."""

    code = "config"


class NotFound(ReplicateError, LookupError):
    """Nothing of that id, name or path exists in the repository."""

    code = "not_found"


class Ambiguous(NotFound):
    """An id prefix fits more than one object."""

    code = "ambiguous"


class PathMissing(ReplicateError):
    """A path to be saved does not exist; the library raises it as `FileNotFoundError`."""

    code = "path_missing"


class CaptureFailed(ReplicateError):
    """A file could not be frozen as it was at the call; nothing was recorded."""

    code = "capture_failed"


class ChangedWhileReading(CaptureFailed):
    """A file kept changing while it was copied, so that no copy is one state of it."""

    code = "changed_while_reading"


class QueueFull(ReplicateError):
    """So much waits to be stored that the call has to wait: repeat it with the same id."""

    code = "queue_full"
    retryable = True


class CallAbandoned(ReplicateError):
    """The client gave a call up while it was answered; nothing was recorded."""

    code = "call_abandoned"


class NotStored(ReplicateError):
    """The snapshot is not in the repository: still being stored, or failed."""

    code = "not_stored"


class CheckoutConflict(ReplicateError):
    """Files in the target directory are in the way."""

    code = "checkout_conflict"


class CheckoutFailed(ReplicateError):
    """A file could not be written to the target directory, for want of space or permission, say."""

    code = "checkout_failed"


class MountFailed(ReplicateError):
    """A mount could not be made or removed."""

    code = "mount_failed"


class RepositoryError(ReplicateError):
    """Base of what can be wrong with a repository."""

    code = "repository"


class RepositoryUnreachable(RepositoryError):
    """The store cannot be reached or answers with an error; a retry can help."""

    code = "repository_unreachable"
    exit_status = 3
    retryable = True


class RepositoryMissing(RepositoryUnreachable):
    """There is no repository at that place."""

    code = "repository_missing"
    retryable = False


class RepositoryFull(RepositoryError):
    """No space is left where the repository lies."""

    code = "repository_full"
    retryable = True


class RepositoryDamaged(RepositoryError):
    """Bytes in the repository are not what was written."""

    code = "repository_damaged"


class RepositoryIncompatible(RepositoryError):
    """The repository was written by a newer version or with unknown features."""

    code = "repository_incompatible"


class StateUnwritable(ReplicateError):
    """The daemon cannot write its journal: usually no space is left where `REPLICATE_HOME` lies."""

    code = "state_unwritable"
    retryable = True


class DaemonUnavailable(ReplicateError):
    """The daemon cannot be started or does not answer."""

    code = "daemon_unavailable"
    exit_status = 3
    retryable = True


class DaemonIncompatible(DaemonUnavailable):
    """The running daemon speaks another version of the protocol."""

    code = "daemon_incompatible"
    retryable = False


class InternalError(ReplicateError):
    """A bug of ours; the daemon's log has the traceback."""

    code = "internal"


def from_code(code: str, message: str, hint: str, fields: Mapping[str, str]) -> ReplicateError:
    """The error with this `code`, as it was raised at the other end; an unknown code gives the base."""
    return _BY_CODE.get(code, ReplicateError)(message, hint=hint, fields=fields)


def _tree(base: type[ReplicateError]) -> list[type[ReplicateError]]:
    return [base, *(cls for child in base.__subclasses__() for cls in _tree(child))]


_BY_CODE: dict[str, type[ReplicateError]] = {cls.code: cls for cls in _tree(ReplicateError)}
