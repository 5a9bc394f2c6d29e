"""Where a project is, which repository it writes to, and what is ignored: file, environment, defaults.

Used by the library and the command line; the daemon is told the results and never reads a user's
configuration itself. `find_project` is the only entrance.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from replicate.errors import ConfigError

if TYPE_CHECKING:
    import yaml

CaptureMode = Literal["auto", "copy"]
RepositoryOrigin = Literal["argument", "environment", "config", "default"]

CONFIG_NAMES = ("replicate.yaml", "replicate.yml")
CONFIG_KEYS = ("repository", "capture", "ignore")
CAPTURE_MODES: tuple[CaptureMode, ...] = ("auto", "copy")
DEFAULT_REPOSITORY = "file://.replicate"
_SCHEMES = ("file://", "s3://", "gs://")


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
    #: The file that was read, if there is one.
    file: Path | None = None


def find_project(
    directory: str | os.PathLike[str] | None = None, repository: str | None = None
) -> ProjectConfig:
    """The project for a working directory, by arguments, then environment, then file, then defaults.

    `directory` (or `REPLICATE_PROJECT_DIR`) fixes the project directory: parents are not searched.
    Raises `ConfigError` naming file, line and key.
    """
    chosen = directory or os.environ.get("REPLICATE_PROJECT_DIR") or None
    if chosen is not None:
        start = Path(chosen).expanduser().absolute()
        if not start.is_dir():
            raise ConfigError(f"the project directory is not a directory: {start}")
        file = _config_in(start)
    else:
        start = Path.cwd()
        file = next((found for d in (start, *start.parents) if (found := _config_in(d))), None)
    project = file.parent if file else start
    settings = _load(file) if file else _Settings()
    origin: RepositoryOrigin
    if repository:
        url, origin = repository, "argument"
    elif os.environ.get("REPLICATE_REPOSITORY"):
        url, origin = os.environ["REPLICATE_REPOSITORY"], "environment"
    elif settings.repository:
        url, origin = settings.repository, "config"
    else:
        url, origin = DEFAULT_REPOSITORY, "default"
    return ProjectConfig(
        directory=project,
        repository=resolve_repository(url, project),
        repository_origin=origin,
        capture=settings.capture,
        ignore=settings.ignore,
        file=file,
    )


def resolve_repository(url: str, project: Path) -> str:
    """A repository URL in its one absolute form; raises `ConfigError` for anything else.

    `file://relative` is relative to the project directory; `%20` and the like are decoded.
    """
    if not url.startswith(_SCHEMES):
        shown = url.split("://", 1)[0] + "://" if "://" in url else url
        raise ConfigError(
            f"not a repository URL: {shown!r}",
            hint="use file://relative, file:///absolute, s3://bucket/prefix or gs://bucket/prefix",
        )
    if not url.startswith("file://"):
        return url.rstrip("/")
    path = unquote(url[len("file://") :])
    if not path:
        raise ConfigError("the repository URL `file://` has no path", hint="use file://.replicate")
    if "\0" in path:
        raise ConfigError("the repository URL holds a NUL character")
    return "file://" + os.path.normpath(project / os.path.expanduser(path))


@dataclass(frozen=True, slots=True)
class _Settings:
    repository: str | None = None
    capture: CaptureMode = "auto"
    ignore: tuple[str, ...] = ()


def _config_in(directory: Path) -> Path | None:
    return next((file for name in CONFIG_NAMES if (file := directory / name).is_file()), None)


def _load(file: Path) -> _Settings:
    import yaml  # 25 ms; most projects have no config file

    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if root is None:
        return _Settings()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{file}:1: expected `key: value` lines",
            hint="for example repository: file://.replicate",
        )
    return _interpret(file, root)


def _interpret(file: Path, root: yaml.MappingNode) -> _Settings:
    import yaml

    found: dict[str, tuple[int, object]] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key not in CONFIG_KEYS:
            near = difflib.get_close_matches(key, CONFIG_KEYS, n=1, cutoff=0.0)
            raise ConfigError(
                f"{file}:{line}: unknown key `{key}`",
                hint=f"did you mean `{near[0]}`? The keys are {', '.join(CONFIG_KEYS)}",
                fields={"file": str(file), "line": str(line), "key": key},
            )
        if key in found:
            raise ConfigError(f"{file}:{line}: `{key}` is given twice")
        loader = yaml.SafeLoader("")
        try:
            found[key] = line, loader.construct_document(value_node)
        except yaml.YAMLError as error:
            raise ConfigError(f"{file}:{line}: the value of `{key}` cannot be read: {error}") from error
        finally:
            loader.dispose()
    return _Settings(
        repository=_repository(file, found),
        capture=_capture(file, found),
        ignore=_ignore(file, found),
    )


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
