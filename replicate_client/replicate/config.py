"""Where a project is, which repository it writes to, and what is ignored: file, environment, defaults.

Used by the library and the command line; the daemon is told the results and never reads a user's
configuration itself. `find_project` is the only entrance.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from replicate import access
from replicate.errors import ConfigError
from replicate.phrases import escape, is_text
from replicate.sizes import parse_rate, parse_size

if TYPE_CHECKING:
    import yaml

CaptureMode = Literal["auto", "copy"]
RepositoryOrigin = Literal["argument", "environment", "config", "default"]

CONFIG_NAMES = ("replicate.yaml", "replicate.yml")
CONFIG_KEYS = (
    "repository",
    "capture",
    "ignore",
    "queue_limit",
    "spool_limit",
    "upload_limit",
    "cache_size",
    "warn_above",
    "s3",
    "gs",
)
CAPTURE_MODES: tuple[CaptureMode, ...] = ("auto", "copy")
#: The ways to freeze a file, first the one that is tried first, that can be insisted on.
RUNGS = ("lease", "reflink", "memory", "copy")
#: For debugging, tests and benchmarks: the only rung in which this process has files frozen.
RUNG_VARIABLE = "REPLICATE_CAPTURE_RUNG"
DEFAULT_WARN_ABOVE = 10 * 10**9
DEFAULT_CACHE_SIZE = 10 * 10**9
DEFAULT_REPOSITORY = "file://.replicate"
_SCHEMES = ("file://", "s3://", "gs://")
_SECRET_WORDS = ("key", "secret", "token", "password", "credential")
_NO_SECRETS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or name a profile of"
    " ~/.aws with `s3: {profile: NAME}`"
)
_YAML_TAG = "tag:yaml.org,2002:"
_YAML_SCALARS = ("bool", "int", "float", "timestamp")


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    """One project: the directory that saved paths are relative to, and its repository."""

    #: Absolute.
    directory: Path
    #: With an absolute path for `file://`.
    repository: str
    #: Where the repository's URL came from; a default one may not exist yet.
    repository_origin: RepositoryOrigin
    capture: CaptureMode = "auto"
    ignore: tuple[str, ...] = ()
    #: How many bytes may wait to be stored, and of them in the spool, before calls wait; 0: the default.
    queue_limit: int = 0
    spool_limit: int = 0
    #: How many bytes a second may be sent to the repository; 0: no limit.
    upload_limit: int = 0
    #: How many bytes of what mounts and checkouts read may be kept on this machine; 0: none.
    cache_size: int = DEFAULT_CACHE_SIZE
    #: How many new bytes of one snapshot are unusual enough to be told of; 0: none are.
    warn_above: int = DEFAULT_WARN_ABOVE
    #: The file that was read, if there is one.
    file: Path | None = None


def find_project(
    directory: str | os.PathLike[str] | None = None, repository: str | None = None
) -> ProjectConfig:
    """The project for a working directory, by arguments, then environment, then file, then defaults.

    `directory` (or `REPLICATE_PROJECT_DIR`) fixes the project directory: parents are not searched.
    Raises `ConfigError` naming file, line and key, or the environment variable.
    """
    if repository is not None and not isinstance(repository, str):
        raise TypeError(f"repository must be a URL, not {repository!r}")
    if directory:
        start = _project_directory(directory)
        file = _config_in(start)
    elif os.environ.get("REPLICATE_PROJECT_DIR"):
        with _naming("REPLICATE_PROJECT_DIR"):
            start = _project_directory(os.environ["REPLICATE_PROJECT_DIR"])
        file = _config_in(start)
    else:
        start = working_directory()
        file = next((found for d in (start, *start.parents) if (found := _config_in(d))), None)
    project = file.parent if file else start
    settings = _load(file) if file else _Settings()
    origin: RepositoryOrigin
    if repository:
        url, origin = resolve_repository(repository, project), "argument"
    elif os.environ.get("REPLICATE_REPOSITORY"):
        with _naming("REPLICATE_REPOSITORY"):
            url, origin = resolve_repository(os.environ["REPLICATE_REPOSITORY"], project), "environment"
    elif settings.repository:
        url, origin = resolve_repository(settings.repository, project), "config"
    else:
        url, origin = resolve_repository(DEFAULT_REPOSITORY, project), "default"
    scheme = access.scheme_of(url)
    access.note_settings(url, settings.buckets.get(scheme, {}) if scheme else {})
    return ProjectConfig(
        directory=project,
        repository=url,
        repository_origin=origin,
        capture=settings.capture,
        ignore=settings.ignore,
        queue_limit=settings.queue_limit,
        spool_limit=settings.spool_limit,
        upload_limit=settings.upload_limit,
        cache_size=settings.cache_size,
        warn_above=settings.warn_above,
        file=file,
    )


def working_directory() -> Path:
    """The working directory; raises `ConfigError` when it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "the working directory does not exist any more",
            hint="change into a directory that exists, or name the project directory",
        ) from None


def absolute_path(path: str | os.PathLike[str]) -> str:
    """A path seen from the root; raises `ValueError` for an empty one, `ConfigError` as above."""
    text = os.fsdecode(path)
    if not text:
        raise ValueError('the directory must not be empty; "." is the working directory')
    return os.path.normpath(text if os.path.isabs(text) else working_directory() / text)


def resolve_repository(url: str, project: Path) -> str:
    """A repository URL in its one absolute form; raises `ConfigError` for anything else.

    `file://relative` is relative to the project directory; `%20` and the like are decoded. The result
    is UTF-8, so that it can be sent and written down as text.
    """
    if not url.startswith(_SCHEMES):
        shown = url.split("://", 1)[0] + "://" if "://" in url else url
        raise ConfigError(
            f"not a repository URL: {shown!r}",
            hint="use file://relative, file:///absolute, s3://bucket/prefix or gs://bucket/prefix",
        )
    if not url.startswith("file://"):
        scheme, _, rest = url.partition("://")
        if "@" in rest.partition("/")[0]:
            # Not shown: it is in logs soon enough.
            raise ConfigError(f"the repository URL holds credentials: {scheme}://…", hint=_NO_SECRETS)
        return _checked_text(url.rstrip("/"))
    path = unquote(url[len("file://") :], errors="surrogateescape")
    if not path:
        raise ConfigError("the repository URL `file://` has no path", hint="use file://.replicate")
    if "\0" in path:
        raise ConfigError("the repository URL holds a NUL character")
    return _checked_text("file://" + os.path.normpath(project / os.path.expanduser(path)))


def _checked_text(url: str) -> str:
    if not is_text(url):
        raise ConfigError(
            f"the path of the repository is not UTF-8: {escape(url)}",
            hint="set `repository` in replicate.yaml, or REPLICATE_REPOSITORY, to a path in UTF-8",
        )
    return url


def _project_directory(chosen: str | os.PathLike[str]) -> Path:
    directory = Path(chosen).expanduser()
    if not directory.is_absolute():
        directory = working_directory() / directory
    if not directory.is_dir():
        raise ConfigError(f"the project directory is not a directory: {escape(str(directory))}")
    return directory


@contextmanager
def _naming(variable: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error.message}", hint=error.hint) from None


@dataclass(frozen=True, slots=True)
class _Settings:
    repository: str | None = None
    capture: CaptureMode = "auto"
    ignore: tuple[str, ...] = ()
    queue_limit: int = 0
    spool_limit: int = 0
    upload_limit: int = 0
    cache_size: int = DEFAULT_CACHE_SIZE
    warn_above: int = DEFAULT_WARN_ABOVE
    #: How buckets are reached, as `access.SETTINGS` has it.
    buckets: Mapping[access.Scheme, Mapping[str, str]] = field(default_factory=dict)


def _config_in(directory: Path) -> Path | None:
    return next((file for name in CONFIG_NAMES if (file := directory / name).is_file()), None)


def _load(file: Path) -> _Settings:
    import yaml  # 25 ms; most projects have no config file

    text = _read(file)
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem or error.context}") from error
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise ConfigError(f"{file}:{line}: not valid YAML: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        return _Settings()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{file}:1: expected `key: value` lines",
            hint="for example repository: file://.replicate",
        )
    return _interpret(file, root)


def _read(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8: byte 0x{data[error.start]:02x}") from None


def _interpret(file: Path, root: yaml.MappingNode) -> _Settings:
    found: dict[str, tuple[int, object]] = {}
    buckets: dict[access.Scheme, Mapping[str, str]] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = _plain_value(key_node)
        if key not in CONFIG_KEYS:
            near = difflib.get_close_matches(str(key), CONFIG_KEYS, n=1, cutoff=0.0)
            raise ConfigError(
                f"{file}:{line}: unknown key `{escape(str(key))}`",
                hint=f"did you mean `{near[0]}`? The keys are {', '.join(CONFIG_KEYS)}",
                fields={"file": str(file), "line": str(line), "key": str(key)},
            )
        if key in found:
            raise ConfigError(f"{file}:{line}: `{key}` is given twice")
        if key in access.SETTINGS:
            buckets["s3" if key == "s3" else "gs"] = _bucket_settings(file, str(key), value_node)
        value = _plain_value(value_node)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and not is_text(part):
                raise ConfigError(f"{file}:{line}: `{key}` holds a lone surrogate: {part!r}")
        found[str(key)] = line, value
    return _Settings(
        repository=_repository(file, found),
        capture=_capture(file, found),
        ignore=_ignore(file, found),
        queue_limit=_quantity(file, found, "queue_limit", parse_size),
        spool_limit=_quantity(file, found, "spool_limit", parse_size),
        upload_limit=_quantity(file, found, "upload_limit", parse_rate),
        cache_size=_size_or_off(
            file, found, "cache_size", DEFAULT_CACHE_SIZE, "with `cache_size: off` nothing is kept"
        ),
        warn_above=_size_or_off(
            file, found, "warn_above", DEFAULT_WARN_ABOVE, "with `warn_above: off` nothing is warned of"
        ),
        buckets=buckets,
    )


def _bucket_settings(file: Path, section: str, node: yaml.Node) -> Mapping[str, str]:
    """How the buckets of one provider are reached; secrets are refused."""
    import yaml

    known = tuple(access.SETTINGS["s3" if section == "s3" else "gs"])
    if _plain_value(node) is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{file}:{node.start_mark.line + 1}: `{section}` must hold `key: value` lines",
            hint=f"the keys are {', '.join(known)}; for example {section}: {{{known[0]}: …}}",
        )
    settings: dict[str, str] = {}
    for key_node, value_node in node.value:
        where, key = f"{file}:{key_node.start_mark.line + 1}", escape(str(_plain_value(key_node)))
        if any(word in key.lower() for word in _SECRET_WORDS):
            raise ConfigError(
                f"{where}: `{section}.{key}`: credentials are not read from {file.name},"
                " which is saved and shared with the code",
                hint=_NO_SECRETS,
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: unknown key `{section}.{key}`",
                hint=f"did you mean `{near[0]}`? The keys of `{section}` are {', '.join(known)}",
                fields={"file": str(file), "line": where.rpartition(":")[2], "key": f"{section}.{key}"},
            )
        if key in settings:
            raise ConfigError(f"{where}: `{section}.{key}` is given twice")
        value = _plain_value(value_node)
        text = value.number if isinstance(value, _Other) else value
        if not isinstance(text, str) or not text or not is_text(text):
            raise ConfigError(f"{where}: `{section}.{key}` must be a text, not {value!r}")
        if key == "endpoint":
            _check_endpoint(f"{where}: `{section}.{key}`", text)
        settings[key] = text
    return settings


def _check_endpoint(where: str, text: str) -> None:
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"{where} must be an http:// or https:// URL, not {text!r}")
    if "@" in text.split("/")[2]:
        raise ConfigError(f"{where} holds credentials", hint=_NO_SECRETS)


def _plain_value(node: yaml.Node) -> object:
    """What the keys can hold: text, lists of text and nothing; other values only as they are shown.

    Tags are not obeyed: no object is made, and no number or date can be out of range.
    """
    import yaml

    kind = node.tag.removeprefix(_YAML_TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        # Not the sequences in it: one may hold itself.
        return [
            _plain_value(item) if isinstance(item, yaml.ScalarNode) else _Other(item) for item in node.value
        ]
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return str(node.value)
    if isinstance(node, yaml.ScalarNode) and kind == "null":
        return None
    return _Other(node)


class _Other:
    """A value that is no text; only a number, or `off`, may be what a key can have."""

    def __init__(self, node: yaml.Node) -> None:
        #: As it was written, if it is a number.
        self.number = str(node.value) if node.tag in (_YAML_TAG + "int", _YAML_TAG + "float") else ""
        #: Whether it is one of YAML's words for false, of which `off` is one.
        self.is_off = node.tag == _YAML_TAG + "bool" and node.value.lower() in ("off", "no", "false")
        known = {"map": "a mapping", "seq": "a list", **dict.fromkeys(_YAML_SCALARS, str(node.value))}
        self._shown = known.get(node.tag.removeprefix(_YAML_TAG), node.tag.replace(_YAML_TAG, "!!"))

    def __repr__(self) -> str:
        return escape(self._shown)


def _repository(file: Path, found: dict[str, tuple[int, object]]) -> str | None:
    line, value = found.get("repository", (0, None))
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"{file}:{line}: `repository` must be a URL, not {value!r}")
    try:
        resolve_repository(value, file.parent)
    except ConfigError as error:
        raise ConfigError(f"{file}:{line}: {error.message}", hint=error.hint) from None
    return value


def _capture(file: Path, found: dict[str, tuple[int, object]]) -> CaptureMode:
    line, value = found.get("capture", (0, "auto"))
    for mode in CAPTURE_MODES:
        if value == mode:
            return mode
    raise ConfigError(f"{file}:{line}: `capture` must be auto or copy, not {value!r}")


def _ignore(file: Path, found: dict[str, tuple[int, object]]) -> tuple[str, ...]:
    line, value = found.get("ignore", (0, []))
    if isinstance(value, str):
        return (value,)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise ConfigError(f"{file}:{line}: `ignore` must be a list of patterns, not {value!r}")
    return tuple(value)


def _size_or_off(file: Path, found: dict[str, tuple[int, object]], key: str, default: int, hint: str) -> int:
    _, value = found.get(key, (0, None))
    if value is None:
        return default
    if value == "off" or (isinstance(value, _Other) and value.is_off):
        return 0
    try:
        return _quantity(file, found, key, parse_size)
    except ConfigError as error:
        raise ConfigError(error.message, hint=hint, fields=error.fields) from None


def _quantity(file: Path, found: dict[str, tuple[int, object]], key: str, parse: Callable[[str], int]) -> int:
    line, value = found.get(key, (0, None))
    if value is None:
        return 0
    text = value if isinstance(value, str) else value.number if isinstance(value, _Other) else ""
    try:
        return parse(text)
    except ValueError as error:
        is_shown = isinstance(value, str) or text
        problem = error if is_shown else str(error).rpartition(": ")[0] + f": {value!r}"
        raise ConfigError(
            f"{file}:{line}: `{key}`: {problem}", fields={"file": str(file), "line": str(line), "key": key}
        ) from None
