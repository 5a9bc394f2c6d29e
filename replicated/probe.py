"""Tries a repository out for `replicate doctor`: can it be opened, written, listed and read back?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replicate.errors import ReplicateError, RepositoryMissing
from replicate.ids import new_id
from replicated.repositories import OpenRepositories
from replicated.repository import Repository


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def probe_repository(repositories: OpenRepositories, url: str) -> list[Finding]:
    """What was tried and what came of it, in order; a repository that is not there yet is fine."""
    try:
        repository = repositories.get(url)
    except RepositoryMissing:
        return [_can_be_made(url)]
    except ReplicateError as error:
        return [Finding("repository", False, error.message, error.hint)]
    try:
        return [Finding("repository", True, f"{url} (id {repository.id[:7]})"), *_try_store(repository)]
    except ReplicateError as error:
        return [Finding("repository", False, error.message, error.hint)]


def _can_be_made(url: str) -> Finding:
    directory = Path(url.removeprefix("file://"))
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding("repository", True, f"{url} does not exist yet; the first init() makes it")
    return Finding(
        "repository",
        False,
        f"{url} does not exist and {existing} cannot be written to",
        "set `repository` in replicate.yaml to a place that you can write to",
    )


def _try_store(repository: Repository) -> Iterator[Finding]:
    store = repository.store
    key = f"probe/{new_id()}"
    data = os.urandom(4096)
    store.put(key, [data])
    try:
        yield Finding("repository write", True, "an object was written")
        listed = any(found.key == key for found in store.list("probe/"))
        yield Finding(
            "repository list", listed, "the object is listed" if listed else "the object is not listed"
        )
        same = store.get(key) == data and store.get(key, 100, 50) == data[100:150]
        yield Finding(
            "repository read", same, "the object was read back" if same else "other bytes came back"
        )
    finally:
        store.delete(key)
