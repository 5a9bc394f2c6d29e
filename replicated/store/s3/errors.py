"""What botocore raises, as errors of a repository: what failed, why, and what to do.

`read_trouble` says what kind of failure it is, which is all that the store decides by; `explain` puts it
into words. No credential and no signature comes into a message: of an answer only its code and its first
sentence are shown, of an endpoint no user and no query.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from replicate.errors import (
    ConfigError,
    ReplicateError,
    RepositoryFull,
    RepositoryMissing,
    RepositoryUnreachable,
)
from replicated.store.base import StoreBusy


class Kind(enum.Enum):
    """What a failure means for who asked."""

    BUSY = "passes by itself"
    THROTTLED = "passes when less is asked"
    KEY_MISSING = "no such object"
    BUCKET_MISSING = "no such bucket"
    RANGE = "the range begins behind the end"
    PRECONDITION = "the object is there already"
    UNSUPPORTED = "the server cannot do that, or not in this way"
    CREDENTIALS = "missing, wrong or expired credentials"
    DENIED = "these credentials may not do that"
    REGION = "the bucket lies in another region"
    CLOCK = "the clock of this machine is wrong"
    CERTIFICATE = "the certificate of the server is not trusted"
    FULL = "no space is left"
    SETTINGS = "something that was configured cannot be"
    OTHER = "anything else"


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failed request."""

    kind: Kind
    #: What the server or botocore calls it; empty where nothing was said (answers to HEAD have no body).
    code: str
    status: int
    reason: str
    #: The region in which the bucket lies, where the server told it.
    region: str = ""


_KINDS: Final = {
    Kind.BUSY: "InternalError OperationAborted ConditionalRequestConflict RequestTimeout IncompleteBody "
    "BadDigest RequestTimeoutException ServerBusy OperationTimedOut XMinioServerNotInitialized",
    Kind.THROTTLED: "SlowDown ServiceUnavailable Throttling ThrottlingException ThrottledException "
    "Throttled RequestLimitExceeded BandwidthLimitExceeded TooManyRequests RequestThrottled SlowDownRead "
    "SlowDownWrite",
    Kind.KEY_MISSING: "NoSuchKey",
    Kind.BUCKET_MISSING: "NoSuchBucket",
    Kind.RANGE: "InvalidRange",
    Kind.PRECONDITION: "PreconditionFailed",
    Kind.UNSUPPORTED: "NotImplemented MethodNotAllowed InvalidRequest InvalidArgument InvalidDigest "
    "MalformedXML XAmzContentSHA256Mismatch",
    Kind.CREDENTIALS: "ExpiredToken ExpiredTokenException InvalidToken TokenRefreshRequired "
    "InvalidAccessKeyId SignatureDoesNotMatch RequestExpired",
    Kind.DENIED: "AccessDenied AllAccessDisabled AccountProblem InvalidObjectState",
    Kind.REGION: "PermanentRedirect TemporaryRedirect AuthorizationHeaderMalformed "
    "IllegalLocationConstraintException",
    Kind.CLOCK: "RequestTimeTooSkewed",
    Kind.FULL: "XMinioStorageFull XMinioAdminBucketQuotaExceeded QuotaExceeded InsufficientStorage "
    "StorageFull",
}
_BY_CODE: Final = {code: kind for kind, codes in _KINDS.items() for code in codes.split()}
_BY_STATUS: Final = {
    301: Kind.REGION,
    307: Kind.REGION,
    403: Kind.DENIED,
    404: Kind.KEY_MISSING,
    405: Kind.UNSUPPORTED,
    408: Kind.BUSY,
    409: Kind.BUSY,
    412: Kind.PRECONDITION,
    416: Kind.RANGE,
    429: Kind.THROTTLED,
    501: Kind.UNSUPPORTED,
    503: Kind.THROTTLED,
    507: Kind.FULL,
}
# What botocore raises by itself, by the name of the class: there is no other way to tell without importing
# it, and it is imported only where a bucket is opened.
_BY_CLASS: Final = {
    "NoCredentialsError": Kind.CREDENTIALS,
    "PartialCredentialsError": Kind.CREDENTIALS,
    "CredentialRetrievalError": Kind.CREDENTIALS,
    "TokenRetrievalError": Kind.CREDENTIALS,
    "SSOTokenLoadError": Kind.CREDENTIALS,
    "UnauthorizedSSOTokenError": Kind.CREDENTIALS,
    "SSOError": Kind.CREDENTIALS,
    "EndpointConnectionError": Kind.BUSY,
    "ConnectTimeoutError": Kind.BUSY,
    "ReadTimeoutError": Kind.BUSY,
    "ConnectionClosedError": Kind.BUSY,
    "ProxyConnectionError": Kind.BUSY,
    "HTTPClientError": Kind.BUSY,
    "ResponseStreamingError": Kind.BUSY,
    "IncompleteReadError": Kind.BUSY,
    "ResponseParserError": Kind.BUSY,
    "FlexibleChecksumError": Kind.BUSY,
    "ProfileNotFound": Kind.SETTINGS,
    "ConfigParseError": Kind.SETTINGS,
    "InvalidRegionError": Kind.SETTINGS,
    "InvalidConfigError": Kind.SETTINGS,
    "NoRegionError": Kind.SETTINGS,
    "InfiniteLoopConfigError": Kind.SETTINGS,
    # "Invalid endpoint: …".
    "ValueError": Kind.SETTINGS,
}
_EXPECTED_REGION: Final = re.compile(r"expecting '([a-z0-9-]+)'")
_SPACE: Final = re.compile(r"\s+")
_LONGEST_REASON: Final = 200


def read_trouble(error: Exception) -> Trouble:
    """What kind of failure botocore, or a socket below it, has reported; bugs are raised again."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _read_answer(response)
    if isinstance(error, RecursionError):
        # botocore follows a redirection that does not say where to for as long as it can.
        return Trouble(Kind.REGION, "PermanentRedirect", 301, "the server does not say in which region it is")
    for cls in type(error).__mro__:
        name = cls.__name__
        if name == "SSLError":
            # A connection that breaks in the middle is one of these as well, and a file that cannot be read.
            is_lasting = "CERTIFICATE" in str(error).upper() or "[Errno 2]" in str(error)
            kind = Kind.CERTIFICATE if is_lasting else Kind.BUSY
            return Trouble(kind, name, 0, _sentence(_cause(error)))
        if name in _BY_CLASS:
            return Trouble(_BY_CLASS[name], name, 0, _sentence(_cause(error)))
    module = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and module not in ("boto3", "botocore", "urllib3"):
        raise error
    kind = Kind.OTHER if module.startswith("boto") else Kind.BUSY
    return Trouble(kind, type(error).__name__, 0, _sentence(_cause(error)))


def explain(trouble: Trouble, action: str, url: str, endpoint: str) -> ReplicateError:
    """The error to raise: `action` says what was tried (`read index/01`) in the store at `url`."""
    fields = {"url": url, "endpoint": endpoint, "code": trouble.code}
    where = f" at {endpoint}" if endpoint else ""
    said = f"{trouble.code}: {trouble.reason}" if trouble.reason else trouble.code
    message = f"cannot {action} in {url}{where}: {said or f'status {trouble.status}'}"
    bucket = url.split("/", 3)[2]
    if trouble.kind in (Kind.BUSY, Kind.THROTTLED):
        return StoreBusy(
            message,
            hint=_BUSY_HINTS.get(trouble.code, ""),
            fields=fields,
            is_throttled=trouble.kind is Kind.THROTTLED,
        )
    if trouble.kind is Kind.BUCKET_MISSING:
        return RepositoryMissing(
            f"no repository at {url}: there is no bucket {bucket}{where}",
            hint="check the URL, AWS_ENDPOINT_URL and the profile; `replicate.init` makes the bucket where "
            "the credentials allow that",
            fields=fields,
        )
    if trouble.kind is Kind.FULL:
        return RepositoryFull(message, hint="free some space there; what is pending is kept", fields=fields)
    if trouble.kind is Kind.SETTINGS:
        return ConfigError(
            f"{url} cannot be used: {trouble.reason}", hint=_HINTS[Kind.SETTINGS], fields=fields
        )
    return RepositoryUnreachable(message, hint=_HINTS.get(trouble.kind, ""), fields=fields)


_BUSY_HINTS: Final = {
    "EndpointConnectionError": "check the network, and AWS_ENDPOINT_URL if the server is not Amazon's",
    "ConnectTimeoutError": "check the network, and AWS_ENDPOINT_URL if the server is not Amazon's",
    "ProxyConnectionError": "check HTTP_PROXY, HTTPS_PROXY and NO_PROXY",
}
_HINTS: Final = {
    Kind.CREDENTIALS: "renew them (`aws sso login`, `aws configure`), or set AWS_PROFILE, or "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; what is pending is kept",
    Kind.DENIED: "the credentials need s3:ListBucket on the bucket and s3:GetObject, s3:PutObject and "
    "s3:DeleteObject on what is in it",
    Kind.REGION: "set AWS_REGION to the region of the bucket",
    Kind.CLOCK: "set the clock of this machine, for instance with `timedatectl set-ntp true`",
    Kind.CERTIFICATE: "set AWS_CA_BUNDLE to the file with the certificates of the server's authority",
    Kind.UNSUPPORTED: "the server does not speak S3 well enough: `replicate doctor --store URL` tries it",
    Kind.SETTINGS: "check ~/.aws/config and the AWS_ variables of the environment",
    Kind.PRECONDITION: "another process writes the same object; try again",
}


def plain_endpoint(url: str) -> str:
    """The endpoint as it may be shown: no user, no password, no query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _read_answer(response: Mapping[str, Any]) -> Trouble:
    error: Mapping[str, Any] = response.get("Error") or {}
    metadata: Mapping[str, Any] = response.get("ResponseMetadata") or {}
    headers: Mapping[str, str] = metadata.get("HTTPHeaders") or {}
    code = str(error.get("Code") or "")
    status = int(metadata.get("HTTPStatusCode") or 0)
    reason = str(error.get("Message") or "")
    if code.isdigit():
        # botocore writes the status where the server gave no code.
        status, code = status or int(code), ""
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if kind is None:
        kind = Kind.BUSY if status >= 500 else Kind.OTHER
    region = str(error.get("Region") or headers.get("x-amz-bucket-region") or "")
    if not region and (expected := _EXPECTED_REGION.search(reason)):
        region = expected[1]
    if kind is Kind.CLOCK and "date" in headers:
        reason = f"{reason} It is {headers['date']} there."
    return Trouble(kind, code or f"status {status}", status, _sentence(reason), region)


def _cause(error: Exception) -> str:
    """What botocore was told itself, which says more than its own sentence around it."""
    inner = getattr(error, "kwargs", {}).get("error") if hasattr(error, "kwargs") else None
    if inner is None:
        return str(error)
    text = str(inner)
    # urllib3 writes the object first: "<...HTTPConnection object at 0x7f…>: Failed to …".
    return re.sub(r"^.*object at 0x[0-9a-f]+>?[,)]*:? *|^\S*HTTPS?Connection\([^)]*\): *", "", text)


def _sentence(text: str) -> str:
    """One line of it, without a full stop, and without anything that may be a signature."""
    line = _SPACE.sub(" ", "".join(sign if sign.isprintable() else " " for sign in text)).strip()
    line = re.sub(r"(?i)(signature|credential|token|secret)=[^\s&]+", r"\1=…", line)
    line = re.sub(r"//[^/\s@]+@", "//", line)
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON].rstrip() + "…"
    return line.rstrip(".")
