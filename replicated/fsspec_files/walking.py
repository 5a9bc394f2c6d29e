"""Walks directories for `filesystem`, through links too, and comes to an end whatever they lead to.

A link to a directory above, on the way there or in the snapshot, is shown and not gone into: it would lead
back to itself. A few links to other directories can make very many ways, so more than `MAX_LINKED` of them
raise an error: a list that leaves something out would be wrong.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from replicated.fsspec_files.failing import is_missing
from replicated.fsspec_files.looking import Found
from replicated.tree import Tree

#: Directories that one walk goes into by links.
MAX_LINKED: Final = 1000


class Directory(NamedTuple):
    """A directory that was found; both are None where only its path is known."""

    tree: Tree | None
    found: Found | None


class Listed(NamedTuple):
    """A directory, and what lies in it: for each entry its description, and where it is."""

    directory: Directory
    entries: Sequence[tuple[Directory, dict[str, Any]]]


Infos: TypeAlias = dict[str, dict[str, Any]]
#: Lists a directory, of which it was told before where it is, or nothing.
Lister: TypeAlias = Callable[[str, Directory], Listed]

UNKNOWN: Final = Directory(None, None)


class _Step(NamedTuple):
    path: str
    directory: Directory
    depth: int
    #: The real paths of the directories above.
    above: frozenset[tuple[bytes, ...]]
    #: What was found, where only that is left to tell.
    told: tuple[Infos, Infos] | None = None


def walk(
    path: str,
    list_directory: Lister,
    maxdepth: int | None,
    topdown: bool,
    on_error: str | Callable[[OSError], Any],
) -> Iterator[tuple[str, Infos, Infos]]:
    """(path, directories, files) of each directory, both by name.

    With `topdown`, who takes directories out of what was given keeps them from being gone into.
    """
    steps = [_Step(path, UNKNOWN, 1, frozenset())]
    linked = 0
    while steps:
        step = steps.pop()
        if step.told is not None:
            yield step.path, *step.told
            continue
        try:
            listed = list_directory(step.path, step.directory)
        except OSError as error:
            if callable(on_error):
                on_error(error)
            elif on_error == "raise" or not is_missing(error):
                raise
            continue
        directories: Infos = {}
        files: Infos = {}
        places: dict[str, Directory] = {}
        for place, info in listed.entries:
            name = "" if info["name"] == step.path else info["name"].rpartition("/")[2]
            if info["type"] == "directory":
                directories[name] = info
                places[name] = place
            else:
                files[name] = info
        if topdown:
            yield step.path, directories, files
        else:
            steps.append(step._replace(told=(directories, files)))
        if step.depth == maxdepth:
            continue
        found = listed.directory.found
        above = step.above if found is None else step.above | {found.names}
        below: list[_Step] = []
        for name, info in directories.items():
            place = places[name]
            if info.get("islink"):
                if place.found is None or _leads_up(place.found.names, above):
                    continue
                linked += 1
                if linked > MAX_LINKED:
                    raise OSError(errno.ELOOP, "too many links between directories", path)
            below.append(_Step(info["name"], place, step.depth + 1, above))
        steps.extend(reversed(below))


def _leads_up(names: tuple[bytes, ...], above: Iterable[tuple[bytes, ...]]) -> bool:
    return any(directory[: len(names)] == names for directory in above)
