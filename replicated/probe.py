"""Tries a repository, or the store below it, for `replicate doctor`: what is found in each, as data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from replicate.errors import ReplicateError, RepositoryMissing
from replicated.repositories import OpenRepositories
from replicated.store import open_store
from replicated.store.base import Store
from replicated.store.probing import Finding, probe_store

_FILE = "file://"


def probe(
    repositories: OpenRepositories,
    url: str,
    *,
    is_store: bool,
    environment: Mapping[str, str] | None = None,
) -> list[Finding]:
    """`probe_any_store` or `probe_repository`."""
    return probe_any_store(url, environment) if is_store else probe_repository(repositories, url, environment)


def probe_repository(
    repositories: OpenRepositories, url: str, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    """What was tried and what came of it, in order; a repository that is not there yet is fine.

    `environment`: see `open_store`.
    """
    try:
        repository = repositories.get(url)
        found = Finding("repository", "ok", "found", f"{url} (id {repository.id[:7]})")
        return [found, *_of_repository(repository.store)]
    except RepositoryMissing:
        return _probe_missing(url, environment)
    except ReplicateError as error:
        return [Finding("repository", "fail", "error", error.message, error.hint)]


def probe_any_store(url: str, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """The same of a store, whether or not there is a repository in it; nothing is made there that stays.

    `environment`: see `open_store`.
    """
    try:
        with _opened(url, environment) as store:
            return list(probe_store(store))
    except RepositoryMissing as error:
        return [replace(_can_be_made(url, error), name="reachable")]
    except ReplicateError as error:
        return [Finding("reachable", "fail", "error", error.message, error.hint)]


def _probe_missing(url: str, environment: Mapping[str, str] | None) -> list[Finding]:
    try:
        with _opened(url, environment) as store:
            found = list(_of_repository(store))
    except RepositoryMissing as error:
        return [_can_be_made(url, error)]
    except ReplicateError as error:
        return [Finding("repository", "fail", "error", error.message, error.hint)]
    if found and found[0].value == "missing":
        return [replace(found[0], name="repository")]
    detail = f"{url} does not exist yet; the first init() makes it"
    return [Finding("repository", "ok", "missing", detail), *found]


def _can_be_made(url: str, error: RepositoryMissing) -> Finding:
    if not url.startswith(_FILE):
        return Finding("repository", "warn", "missing", error.message, error.hint)
    directory = Path(url.removeprefix(_FILE))
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        detail = f"{url} does not exist yet; the first init() makes it"
        return Finding("repository", "ok", "missing", detail)
    return Finding(
        "repository",
        "fail",
        "missing",
        f"{url} does not exist and {existing} cannot be written to",
        "set `repository` in replicate.yaml to a place that you can write to",
    )


def _of_repository(store: Store) -> Iterator[Finding]:
    """What is worth knowing at every look, and quick."""
    for finding in probe_store(store, is_thorough=False):
        yield replace(finding, name=f"repository {finding.name}")


@contextlib.contextmanager
def _opened(url: str, environment: Mapping[str, str] | None) -> Iterator[Store]:
    store = open_store(url, create=False, environment=environment)
    try:
        yield store
    finally:
        close = getattr(store, "close", None)
        if close is not None:
            close()
