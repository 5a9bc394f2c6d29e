"""What the SDKs of clouds are told by the environment: sent to the daemon with calls that name a bucket.

The daemon is started once, in some shell; users set AWS_PROFILE, keys or an endpoint in another, and expect
the commands and scripts there to work. So the variables below, and no others, go with each call that names a
repository in a bucket, over the private socket. Nobody writes them to a disk or a log. Used by both ends, and
by `config`, whose settings count where the environment says nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Final, Literal

Scheme = Literal["s3", "gs"]

#: Metadata of a call: what `encode` makes.
METADATA_KEY: Final = "replicate-access-bin"
#: Session tokens are long; more than this is no credential.
MAX_BYTES: Final = 48 << 10

_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_COMMON: Final = frozenset(
    {
        # Where ~/.aws and ~/.config/gcloud are.
        "HOME",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        *_PROXIES,
        *(name.lower() for name in _PROXIES),
    }
)
_NAMES: Final[Mapping[Scheme, frozenset[str]]] = {
    "s3": frozenset({"BOTO_CONFIG"}),
    "gs": frozenset({"GCLOUD_PROJECT", "NO_GCE_CHECK", "STORAGE_EMULATOR_HOST"}),
}
_PREFIXES: Final[Mapping[Scheme, tuple[str, ...]]] = {
    "s3": ("AWS_",),
    "gs": ("GOOGLE_", "CLOUDSDK_", "GCE_METADATA_"),
}
#: These name files: the daemon works in another directory.
_FILES: Final = frozenset(
    {
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CA_BUNDLE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "BOTO_CONFIG",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "CLOUDSDK_CONFIG",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
    }
)

#: What the configuration file may say, and for each the variables that say the same: when one of them is set,
#: that counts; when none is, the first gets the value.
SETTINGS: Final[Mapping[Scheme, Mapping[str, tuple[str, ...]]]] = {
    "s3": {
        "endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
        "region": ("AWS_DEFAULT_REGION", "AWS_REGION"),
        "profile": ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"),
    },
    "gs": {"project": ("GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT")},
}

#: What configuration files said of a repository, by its URL; replaced as a whole, by any thread.
_settings: dict[str, Mapping[str, str]] = {}


def scheme_of(url: str) -> Scheme | None:
    """What kind of bucket a repository is in; None when it is in none."""
    if url.startswith("s3://"):
        return "s3"
    return "gs" if url.startswith("gs://") else None


def is_variable(name: str) -> bool:
    """Whether a variable of the environment can tell how a bucket is reached."""
    return name != "HOME" and any(_is_of(scheme, name) for scheme in _NAMES)


def note_settings(url: str, settings: Mapping[str, str]) -> None:
    """Let the calls of this process that name the repository say this where the environment does not."""
    if settings or url in _settings:
        _settings[url] = dict(settings)


def collect(url: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that tell how the bucket of a repository is reached; empty for one that is in none.

    Paths of files are absolute. `environment` is that of this process unless it is given.
    """
    scheme = scheme_of(url)
    if scheme is None:
        return {}
    given = os.environ if environment is None else environment
    found = {name: value for name, value in given.items() if value and _is_of(scheme, name)}
    for name in _FILES & found.keys():
        found[name] = os.path.abspath(os.path.expanduser(found[name]))
    for key, value in _settings.get(url, {}).items():
        names = SETTINGS[scheme].get(key, ())
        if names and not any(name in found for name in names):
            found[names[0]] = value
    return found


def repository_of(request: object) -> str:
    """The URL of the repository that a request names; empty when it names none."""
    url = getattr(request, "repository", None)
    for field in ("target", "left"):
        url = url or getattr(getattr(request, field, None), "repository", None)
    return url if isinstance(url, str) else ""


def encode(url: str, variables: Mapping[str, str]) -> bytes:
    """The metadata of a call; raises `ValueError` when it is too long to be sent."""
    # Values that are not UTF-8 survive as escapes.
    data = json.dumps([url, dict(variables)]).encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"the variables of the environment for {url} have {len(data)} bytes")
    return data


def decode(data: bytes) -> tuple[str, dict[str, str]]:
    """What `encode` made; raises `ValueError`, which tells nothing of the content."""
    try:
        url, variables = json.loads(data)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("the variables that came with a call cannot be read") from None
    if not isinstance(url, str) or not isinstance(variables, dict):
        raise ValueError("the variables that came with a call cannot be read")
    scheme = scheme_of(url)
    kept = {
        name: value
        for name, value in variables.items()
        if scheme is not None and isinstance(value, str) and _is_of(scheme, name)
    }
    return url, kept


def _is_of(scheme: Scheme, name: str) -> bool:
    return name in _COMMON or name in _NAMES[scheme] or name.startswith(_PREFIXES[scheme])
