"""What Google Cloud Storage and its library say when something fails, in the words of a repository.

The one place that decides what passes (`StoreBusy`, made again by `store.retrying`) and what does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError, RefreshError
from google.cloud.storage.exceptions import DataCorruption
from requests.exceptions import ConnectTimeout, ReadTimeout
from urllib3.exceptions import HTTPError

from replicate.errors import RepositoryError, RepositoryMissing, RepositoryUnreachable
from replicated.store.base import StoreBusy

#: Statuses of a request that may succeed when it is made again.
PASSING: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
#: Of those, what asks for fewer requests.
THROTTLING: Final = frozenset({429, 503})

_THROTTLING_REASONS: Final = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})
# OSError is the base of what `requests` raises; what breaks off in a body comes from below it.
_FAILURES: Final = (GoogleAPICallError, GoogleAuthError, DataCorruption, HTTPError, OSError)
# What the library raises over an answer that is not what it should be.
_UNREADABLE: Final = (ValueError, KeyError, TypeError)


@contextlib.contextmanager
def explained(action: str, place: str) -> Iterator[None]:
    """Let whatever the library raises come out as an error of a repository.

    `action` and `place` (a URL) say what was tried.
    """
    try:
        yield
    except _FAILURES as error:
        raise translate(error, action, place) from error
    except _UNREADABLE as error:
        raise StoreBusy(f"cannot {action} {place}: the answer makes no sense: {_one_line(error)}") from error


def translate(error: Exception, action: str, place: str) -> RepositoryError:
    """The error of a repository for an error of the library."""
    what = f"cannot {action} {place}"
    if isinstance(error, GoogleAPICallError):
        return _translate_answer(error, what)
    if isinstance(error, RefreshError) and not error.retryable:
        return RepositoryUnreachable(
            f"{what}: Google does not take the credentials: {_one_line(error)}",
            hint="log in again (`gcloud auth application-default login`) or renew the key; "
            "what is pending is kept",
        )
    if isinstance(error, DataCorruption):
        return StoreBusy(f"{what}: other bytes came back than their checksum says")
    if isinstance(error, ConnectTimeout | ReadTimeout):
        return StoreBusy(f"{what}: no answer in time", hint="check the network")
    return StoreBusy(f"{what}: no connection, or it broke off: {_one_line(error)}", hint="check the network")


def is_missing_bucket(error: GoogleAPICallError) -> bool:
    """Whether a 404 speaks of the bucket and not of an object in it, as far as its text tells."""
    return "bucket does not exist" in str(error.message)


def missing_bucket(bucket: str) -> RepositoryMissing:
    """There is no such bucket."""
    return RepositoryMissing(
        f"there is no bucket gs://{bucket}",
        hint="check the URL; the first `replicate.init` there makes the bucket if it may",
    )


def _translate_answer(error: GoogleAPICallError, what: str) -> RepositoryError:
    status = int(error.code or 0)
    told = f"{what}: {_one_line(error)}"
    reasons = {str(detail.get("reason")) for detail in error.errors or () if isinstance(detail, dict)}
    is_throttled = status in THROTTLING or bool(reasons & _THROTTLING_REASONS)
    if status in PASSING or is_throttled:
        return StoreBusy(told, is_throttled=is_throttled)
    if status == 400 and any(word in str(error.message) for word in ("CRC32C", "MD5", "checksum")):
        return StoreBusy(f"{what}: other bytes arrived than were sent")
    if status == 401:
        return RepositoryUnreachable(
            f"{what}: Google does not know who asks",
            hint="log in with `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS",
        )
    if status == 403:
        return RepositoryUnreachable(
            f"{what}: not allowed: {_one_line(error)}",
            hint="ask for the role Storage Object User (roles/storage.objectUser) on the bucket",
        )
    if status == 404:
        return RepositoryMissing(f"{what}: there is no such bucket", hint="check the URL")
    return RepositoryUnreachable(told)


def _one_line(error: Exception) -> str:
    """The message, without the address of the request in front of it, on one line of bearable length."""
    message = str(error.message) if isinstance(error, GoogleAPICallError) else str(error)
    # "POST https://…: why"
    front, separator, rest = message.partition(": ")
    if separator and "://" in front:
        message = rest
    line = " ".join(message.split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:299]}…"
