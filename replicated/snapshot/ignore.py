"""Which entries of a directory tree are left out of a snapshot, and why.

Patterns are gitignore syntax, matched by pathspec: those of the call, then those of the config file,
then `.replicateignore` files from the deepest directory up, and last the built-in rules; the first that
says anything decides, so a `!pattern` of the user brings a built-in exclusion back. Pure: reading the
ignore files is the caller's part (`walk`).

Matching a pattern costs as much as reading a file. So `NameRules` tell by its name alone that nothing is
said about most of what a directory holds; that they are right is what the tests compare.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Final, Literal, NamedTuple

import pathspec

IGNORE_FILE = ".replicateignore"
#: Never part of a snapshot, whatever patterns say: version control data and our own.
NEVER_SAVED = frozenset({".git", ".replicate"})
_CACHES = frozenset({".mypy_cache", "__pycache__"})
#: Private keys by the names that tools give them.
_KEYS = frozenset({"id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"})
_SECRET_NAMES = frozenset({".env", ".aws", ".ssh", ".netrc"}) | _KEYS
_SECRET_SUFFIXES = (".pem", ".ppk", ".p12", ".pfx")

#: No file can have it, and only a pattern that matches any name matches it.
_NO_NAME: Final = "\0"
_ESCAPED_OR_ODD: Final = re.compile(r"[\\\[\s]")
_WILDCARD: Final = re.compile(r"[*?]")

Decision = Literal["keep", "ignored", "secret"]


class NameRules(NamedTuple):
    """The names in one directory about which a rule may say something; about any other none does."""

    exact: frozenset[bytes]
    suffixes: tuple[bytes, ...]
    #: A pattern for the names that the others cannot express.
    other: re.Pattern[str] | None

    def concerned(self, names: Iterable[bytes]) -> list[bytes]:
        """Those of the names for which `IgnoreRules.decide` has to be asked; the others are kept."""
        exact, suffixes = self.exact, self.suffixes
        if self.other is None:
            return [name for name in names if name in exact or name.endswith(suffixes)]
        matches = self.other.fullmatch
        return [
            name
            for name in names
            if name in exact or name.endswith(suffixes) or matches(os.fsdecode(name)) is not None
        ]


_BUILT_IN: Final = NameRules(
    frozenset(map(os.fsencode, NEVER_SAVED | _CACHES | _SECRET_NAMES)),
    # pathspec takes a name that ends with a line feed for the name without it.
    (*map(os.fsencode, _SECRET_SUFFIXES), b"\n"),
    None,
)
_ANY_NAME: Final = NameRules(frozenset(), (b"",), None)


class IgnoreRules:
    """The rules that hold in one directory; `below` gives those of a subdirectory."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._levels: tuple[_Patterns, ...] = (_Patterns("", patterns),)

    def below(self, directory: str, lines: Iterable[str]) -> IgnoreRules:
        """These rules with the lines of the ignore file in `directory` (relative, "" for the top)."""
        first, *files = self._levels
        return self._with((first, _Patterns(directory, lines), *files))

    def with_path_asked_for(self, path: str) -> IgnoreRules:
        """These rules without the patterns that exclude `path` or a directory above it.

        A path that the user names is saved though a pattern excludes it; the other patterns go on
        to hold for what lies below.
        """
        parts = path.split("/")
        prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        return self._with(tuple(level.without(prefixes) for level in self._levels))

    def decide(self, path: str, name: str, is_directory: bool) -> Decision:
        """What becomes of the entry `path` (relative to the project directory)."""
        if name in NEVER_SAVED:
            return "ignored"
        excluded = self._match(path, is_directory)
        if excluded is not None:
            return "ignored" if excluded else "keep"
        if name in _CACHES:
            return "ignored"
        if name in _SECRET_NAMES or name.endswith(_SECRET_SUFFIXES):
            return "secret"
        return "keep"

    def names(self, directory: str) -> NameRules:
        """The names in `directory` (relative, "" for the top) that may not just be kept."""
        if all(level.is_empty for level in self._levels):
            return _BUILT_IN
        # A pattern that matches a directory matches all that is below it: then each name counts.
        if self._match(f"{directory}/{_NO_NAME}" if directory else _NO_NAME, False) is not None:
            return _ANY_NAME
        exact, suffixes = set(_BUILT_IN.exact), set(_BUILT_IN.suffixes)
        others: set[str] = set()
        for level in self._levels:
            for shape in level.shapes(directory):
                if shape.kind == "exact":
                    exact.add(os.fsencode(shape.text))
                elif shape.kind == "suffix":
                    suffixes.add(os.fsencode(shape.text))
                else:
                    others.add(shape.text)
        other = re.compile("|".join(sorted(others)), re.DOTALL) if others else None
        return NameRules(frozenset(exact), tuple(suffixes), other)

    def _match(self, path: str, is_directory: bool) -> bool | None:
        for level in self._levels:
            excluded = level.match(path, is_directory)
            if excluded is not None:
                return excluded
        return None

    def _with(self, levels: tuple[_Patterns, ...]) -> IgnoreRules:
        rules = IgnoreRules()
        first, *files = levels
        rules._levels = (first, *(level for level in files if not level.is_empty))
        return rules


class _Shape(NamedTuple):
    """What the last component of a pattern can match, or more than that."""

    #: Directories, from that of the patterns down, that it must lie in.
    directories: tuple[str, ...]
    kind: Literal["exact", "suffix", "other"]
    #: A name, the end of a name, or a regular expression.
    text: str


class _Patterns:
    """Patterns that are relative to one directory."""

    def __init__(self, directory: str, lines: Iterable[str]) -> None:
        self._prefix = f"{directory}/" if directory else ""
        self._lines = [line for line in lines if line.strip() and not line.startswith("#")]
        self._spec = pathspec.GitIgnoreSpec.from_lines(self._lines)
        self._shapes = [shape for line in self._lines for shape in _shapes(line)]

    @property
    def is_empty(self) -> bool:
        return not self._lines

    def match(self, path: str, is_directory: bool) -> bool | None:
        """True: excluded, False: brought back by `!`, None: nothing said."""
        if not self._lines or not path.startswith(self._prefix):
            return None
        relative = path[len(self._prefix) :]
        return self._spec.check_file(f"{relative}/" if is_directory else relative).include

    def shapes(self, directory: str) -> list[_Shape]:
        """Those that can match something that lies directly in `directory`."""
        parts = directory[len(self._prefix) :].split("/")
        return [shape for shape in self._shapes if parts[: len(shape.directories)] == [*shape.directories]]

    def without(self, paths: Sequence[str]) -> _Patterns:
        """These without the lines that alone exclude one of `paths`, be it a file or a directory."""
        kept = [
            line
            for line in self._lines
            if not any(
                _Patterns.excludes(line, path[len(self._prefix) :])
                for path in paths
                if path.startswith(self._prefix)
            )
        ]
        return _Patterns(self._prefix[:-1], kept)

    @staticmethod
    def excludes(line: str, relative: str) -> bool:
        spec = pathspec.GitIgnoreSpec.from_lines([line])
        return bool(relative) and any(
            spec.check_file(form).include is True for form in (relative, f"{relative}/")
        )


def _shapes(line: str) -> Iterator[_Shape]:
    # Escapes, sets of characters and blanks are rare, and not worth a second reading of the rules.
    if _ESCAPED_OR_ODD.search(line):
        yield _Shape((), "suffix", "")
        return
    parts = line.removeprefix("!").rstrip("/").split("/")
    if len(parts) > 1 and not parts[0]:
        del parts[0]
    while parts:
        *directories, last = parts
        literal = list(takewhile(lambda part: not _WILDCARD.search(part), directories))
        yield _Shape(tuple(literal), *_name_shape(last))
        # `a/**` says something of `a` itself, too.
        parts = directories if last == "**" else []


def _name_shape(last: str) -> tuple[Literal["exact", "suffix", "other"], str]:
    if not last or last == "**":
        return "suffix", ""
    if not _WILDCARD.search(last):
        return "exact", last
    if last.startswith("*") and not _WILDCARD.search(last, 1):
        return "suffix", last[1:]
    return "other", fnmatch.translate(last)
