"""Which entries of a directory tree are left out of a snapshot, and why.

Patterns are gitignore syntax, matched by pathspec: those of the call, then those of the config file,
then `.replicateignore` files from the deepest directory up, and last the built-in rules; the first that
says anything decides, so a `!pattern` of the user brings a built-in exclusion back. Pure: reading the
ignore files is the caller's part (`capture`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Literal

import pathspec

IGNORE_FILE = ".replicateignore"
#: Never part of a snapshot, whatever patterns say: version control data and our own.
NEVER_SAVED = frozenset({".git", ".replicate"})
_CACHES = frozenset({".mypy_cache", "__pycache__"})
_SECRET_NAMES = frozenset({".env", ".aws", ".ssh", ".netrc"})
#: Private keys by the names that tools give them.
_SECRET_PATTERNS = ("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.ppk", "*.p12", "*.pfx")

Decision = Literal["keep", "ignored", "secret"]


class IgnoreRules:
    """The rules that hold in one directory; `below` gives those of a subdirectory."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._first = _Patterns("", patterns)
        self._files: tuple[_Patterns, ...] = ()

    def below(self, directory: str, lines: Iterable[str]) -> IgnoreRules:
        """These rules with the lines of the ignore file in `directory` (relative, "" for the top)."""
        return self._with(self._first, (_Patterns(directory, lines), *self._files))

    def with_path_asked_for(self, path: str) -> IgnoreRules:
        """These rules without the patterns that exclude `path` or a directory above it.

        A path that the user names is saved though a pattern excludes it; the other patterns go on
        to hold for what lies below.
        """
        parts = path.split("/")
        prefixes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        return self._with(
            self._first.without(prefixes), tuple(level.without(prefixes) for level in self._files)
        )

    def decide(self, path: str, name: str, is_directory: bool) -> Decision:
        """What becomes of the entry `path` (relative to the project directory)."""
        if name in NEVER_SAVED:
            return "ignored"
        for level in (self._first, *self._files):
            decision = level.match(path, is_directory)
            if decision is not None:
                return "ignored" if decision else "keep"
        if name in _CACHES:
            return "ignored"
        if name in _SECRET_NAMES or any(fnmatch.fnmatchcase(name, p) for p in _SECRET_PATTERNS):
            return "secret"
        return "keep"

    def _with(self, first: _Patterns, files: tuple[_Patterns, ...]) -> IgnoreRules:
        rules = IgnoreRules()
        rules._first = first
        rules._files = tuple(level for level in files if not level.is_empty)
        return rules


class _Patterns:
    """Patterns that are relative to one directory."""

    def __init__(self, directory: str, lines: Iterable[str]) -> None:
        self._prefix = f"{directory}/" if directory else ""
        self._lines = [line for line in lines if line.strip() and not line.startswith("#")]
        self._spec = pathspec.GitIgnoreSpec.from_lines(self._lines)

    @property
    def is_empty(self) -> bool:
        return not self._lines

    def match(self, path: str, is_directory: bool) -> bool | None:
        """True: excluded, False: brought back by `!`, None: nothing said."""
        if not self._lines or not path.startswith(self._prefix):
            return None
        relative = path[len(self._prefix) :]
        return self._spec.check_file(f"{relative}/" if is_directory else relative).include

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
        patterns = _Patterns("", kept)
        patterns._prefix = self._prefix
        return patterns

    @staticmethod
    def excludes(line: str, relative: str) -> bool:
        spec = pathspec.GitIgnoreSpec.from_lines([line])
        return bool(relative) and any(
            spec.check_file(form).include is True for form in (relative, f"{relative}/")
        )
