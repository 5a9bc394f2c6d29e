"""Who we are to Google Cloud Storage, and where it is: endpoint, credentials, project.

Found in the variables that the library itself reads, in its order. They may be those of another process (the
user's, who calls the daemon), and `os.environ` is never changed for that: other threads read it.

    STORAGE_EMULATOR_HOST            where an emulator listens; then nobody has to be anybody
    GOOGLE_APPLICATION_CREDENTIALS   a file with credentials of any kind
    CLOUDSDK_CONFIG, HOME            below which `gcloud auth application-default login` leaves a file
    NO_GCE_CHECK, GCE_METADATA_HOST  whether, and where, a machine of Google's is asked who it is
    GOOGLE_CLOUD_PROJECT             in which buckets are made (or GCLOUD_PROJECT)
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google.auth
import google.auth.compute_engine
import google.auth.credentials
import google.auth.exceptions
from google.auth.transport.requests import AuthorizedSession
from google.cloud.storage import Client
from requests import Response
from requests.adapters import HTTPAdapter

from replicate.errors import RepositoryUnreachable

#: Reading, writing and making buckets; not who may do so.
SCOPES: Final = ("https://www.googleapis.com/auth/devstorage.read_write",)
#: Connections that are kept for threads that ask at the same time.
KEPT_CONNECTIONS: Final = 32

DEFAULT_UNIVERSE: Final = "googleapis.com"

_METADATA_HOST: Final = "metadata.google.internal"
_METADATA_TIMEOUT_S: Final = 3.0
_LOGIN_HINT: Final = (
    "run `gcloud auth application-default login`, or let GOOGLE_APPLICATION_CREDENTIALS name a key file"
)


@dataclass(frozen=True, slots=True)
class Access:
    """What a client is made of."""

    credentials: google.auth.credentials.Credentials
    #: With its scheme, without a path.
    endpoint: str
    is_emulator: bool
    #: None: no bucket can be made.
    project: str | None
    #: Whose cloud it is: there are some that Google built for others.
    universe: str = DEFAULT_UNIVERSE


def find_access(environment: Mapping[str, str] | None) -> Access:
    """Who the variables say that we are; None: those of this process.

    Raises `RepositoryUnreachable` when they say nothing, or name a file that cannot be used.
    """
    variables = os.environ if environment is None else environment
    named = variables.get("GOOGLE_CLOUD_PROJECT") or variables.get("GCLOUD_PROJECT")
    emulator = variables.get("STORAGE_EMULATOR_HOST", "")
    if emulator:
        endpoint = emulator if "://" in emulator else f"http://{emulator}"
        anonymous = google.auth.credentials.AnonymousCredentials()
        return Access(anonymous, endpoint.rstrip("/"), True, named)
    try:
        if environment is None:
            credentials, project = google.auth.default(scopes=SCOPES)
        else:
            credentials, project = _find_credentials(environment)
    except google.auth.exceptions.GoogleAuthError as error:
        reason = str(error).partition("\n")[0].strip().rstrip(".")
        raise RepositoryUnreachable(f"no credentials for Google Cloud: {reason}", hint=_LOGIN_HINT) from error
    universe = credentials.universe_domain
    return Access(credentials, f"https://storage.{universe}", False, named or project, universe)


def _find_credentials(variables: Mapping[str, str]) -> tuple[Any, str | None]:
    """What `google.auth.default` finds, with other variables than those of this process."""
    if named := variables.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return _load(named)
    config = variables.get("CLOUDSDK_CONFIG") or os.path.join(
        variables.get("HOME") or os.path.expanduser("~"), ".config", "gcloud"
    )
    path = os.path.join(config, "application_default_credentials.json")
    if os.path.isfile(path):
        return _load(path)
    if variables.get("NO_GCE_CHECK", "").lower() != "true" and _is_machine_of_google(variables):
        universe = variables.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN") or DEFAULT_UNIVERSE
        return google.auth.compute_engine.Credentials(scopes=SCOPES, universe_domain=universe), None
    raise google.auth.exceptions.DefaultCredentialsError(
        f"neither GOOGLE_APPLICATION_CREDENTIALS nor {path} is there"
    )


def _load(path: str) -> tuple[Any, str | None]:
    try:
        Path(path).read_bytes()
    except OSError as error:
        raise google.auth.exceptions.DefaultCredentialsError(f"{path}: {error.strerror}") from error
    with warnings.catch_warnings():
        # It warns of files that other people hand in; these are the user's own.
        warnings.simplefilter("ignore", DeprecationWarning)
        credentials, project = google.auth.load_credentials_from_file(path, scopes=SCOPES)
    return credentials, project


def _is_machine_of_google(variables: Mapping[str, str]) -> bool:
    host = variables.get("GCE_METADATA_HOST") or _METADATA_HOST
    connection = http.client.HTTPConnection(host, timeout=_METADATA_TIMEOUT_S)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/", headers={"Metadata-Flavor": "Google"})
        return connection.getresponse().getheader("Metadata-Flavor") == "Google"
    return False


class Answers:
    """What the headers of answers tell that the library does not pass on. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ahead_s: float | None = None
        self._last = threading.local()

    def note(self, response: Response, *_: object, **__: object) -> None:
        """Look at an answer; a hook of `requests`, called by the thread that asked."""
        self._last.headers = response.headers
        try:
            told = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (KeyError, ValueError):
            return
        with self._lock:
            # It is cut to seconds, so half of one is missing on average.
            self._ahead_s = told + 0.5 - time.time()

    @property
    def ahead_s(self) -> float | None:
        """Seconds that the service's clock is ahead of ours, to about one; None before the first answer."""
        with self._lock:
            return self._ahead_s

    def announced_bytes(self) -> int | None:
        """The length that the last answer to this thread announced for its body, if it did."""
        headers: Mapping[str, str] = getattr(self._last, "headers", {})
        length = headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None


def connect(access: Access, answers: Answers) -> Client:
    """A client for any number of threads; nothing is sent yet."""
    session = AuthorizedSession(access.credentials)
    session.mount(access.endpoint, HTTPAdapter(pool_maxsize=KEPT_CONNECTIONS))
    session.hooks["response"].append(answers.note)
    options = {"api_endpoint": access.endpoint}
    if access.universe != DEFAULT_UNIVERSE:
        options["universe_domain"] = access.universe
    client = Client(
        project=access.project, credentials=access.credentials, _http=session, client_options=options
    )
    # Asks what is known of the bucket, in a thread of its own, also where nothing is traced: a request that
    # nobody wants, and that who may only use objects is refused. (3.17; the library can do without.)
    client._bucket_metadata_cache = None
    return client
