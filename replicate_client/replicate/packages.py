"""Which installed distributions the imported modules come from, with their versions.

The name to import is not the name to install (`sklearn` is in scikit-learn, `yaml` in PyYAML), so the
files of modules are looked up in the distributions' own lists of files. `importlib.metadata` can do that
too, but parses every list; here only the lists of distributions whose name tells nothing are searched, as
bytes. Used by `environment`; nothing is imported and nothing but metadata is read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

#: Name and version stand in the first lines; the description below them can be long.
_METADATA_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Distribution:
    """A directory of metadata, such as `site-packages/PyYAML-6.0.dist-info`."""

    #: The directory on `sys.path` that it lies in.
    root: str
    directory: str

    @property
    def key(self) -> str:
        """Its name as in the name of the directory, in normal form."""
        return _normal(self.directory.partition("-")[0].removesuffix(".egg-info"))

    def read(self, *names: str, limit: int = -1) -> bytes:
        """The first of these files that is there, or nothing."""
        for name in names:
            try:
                with open(os.path.join(self.root, self.directory, name), "rb") as file:
                    return file.read(limit)
            except OSError:
                continue
        return b""

    def name_and_version(self) -> tuple[str, str] | None:
        """As its metadata spells them."""
        head = self.read("METADATA", "PKG-INFO", limit=_METADATA_HEAD_BYTES)
        name = re.search(rb"^Name:[ \t]*(.+?)\s*$", head, re.MULTILINE)
        version = re.search(rb"^Version:[ \t]*(.+?)\s*$", head, re.MULTILINE)
        if name is None or version is None:
            return None
        return name.group(1).decode(errors="replace"), version.group(1).decode(errors="replace")

    def contains(self, module: _Module) -> bool:
        """Whether its list of files holds the file of a module that lies in the same root."""
        if module.root != self.root:
            return False
        record = self.read("RECORD")
        if record:
            return record.startswith(module.file) or b"\n" + module.file in record
        return module.name.encode() in self.read("top_level.txt").split()

    def editable_source(self) -> str | None:
        """The directory that it was installed from with `pip install --editable`, if it was."""
        try:
            origin = json.loads(self.read("direct_url.json") or b"{}")
            if not origin.get("dir_info", {}).get("editable"):
                return None
            return os.path.realpath(unquote(urlsplit(origin["url"]).path))
        except (ValueError, KeyError, AttributeError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class _Module:
    """An imported module, or a part of a namespace package."""

    #: Its outermost name.
    name: str
    #: The directory on `sys.path` that it lies in, or "" when it lies in none.
    root: str
    #: Its file relative to the root, as lists of files spell it, with the comma that follows there.
    file: bytes
    origin: str


def imported_distributions(modules: Mapping[str, ModuleType] | None = None) -> dict[str, str]:
    """Name → version of the distributions that modules in `sys.modules` come from, sorted by name.

    Modules of the standard library and of the project itself have none.
    """
    loaded = list(_third_party(dict(sys.modules if modules is None else modules)))
    roots = {module.root for module in loaded if module.root}
    # The directory of the script can hold anything, a million files for example.
    distributions = list(_installed(roots.union(sys.path[1:])))
    found: set[_Distribution] = set()
    by_key = {(one.root, one.key): one for one in distributions}
    unknown: list[_Module] = []
    for module in loaded:
        same_name = by_key.get((module.root, _normal(module.name)))
        # The parts of a namespace package, such as google.protobuf, are in distributions of other names.
        if same_name is not None and module.file.count(b"/") <= 1:
            found.add(same_name)
        else:
            unknown.append(module)
    found.update(_by_files([one for one in distributions if one not in found], unknown))
    named = [pair for one in found if (pair := one.name_and_version()) is not None]
    return dict(sorted(named, key=lambda pair: pair[0].lower()))


def _by_files(distributions: list[_Distribution], modules: list[_Module]) -> Iterator[_Distribution]:
    for one in distributions:
        owned = [module for module in modules if one.contains(module)]
        if owned:
            yield one
            modules = [module for module in modules if module not in owned]
    # What is left belongs to the project itself or to an editable distribution, which lists no files.
    left = {os.path.realpath(module.origin) for module in modules}
    for one in distributions if left else ():
        source = one.editable_source()
        if source and any(origin.startswith(source + os.sep) for origin in left):
            yield one


def _installed(roots: Iterable[str]) -> Iterator[_Distribution]:
    for root in roots:
        try:
            names = os.listdir(root)
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                yield _Distribution(root, name)


def _third_party(modules: dict[str, ModuleType]) -> Iterator[_Module]:
    roots = {os.path.abspath(entry): entry for entry in sys.path if entry}
    namespaces = {name for name, module in modules.items() if _is_namespace(module)}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if name in namespaces or (parent and parent not in namespaces) or not last:
            continue
        outermost = name.partition(".")[0]
        if outermost in sys.stdlib_module_names or outermost == "__main__":
            continue
        origin = _origin(module)
        if origin is None:
            continue
        # site-packages/yaml/__init__.py has the same root as site-packages/six.py.
        levels = name.count(".") + (2 if Path(origin).stem == "__init__" else 1)
        root = origin
        for _ in range(levels):
            root = os.path.dirname(root)
        file = os.path.relpath(origin, root)
        yield _Module(outermost, roots.get(root, ""), os.fsencode(file) + b",", origin)


def _spec_of(module: object) -> object:
    # Through the dictionary: modules that load their contents lazily answer every attribute.
    return getattr(module, "__dict__", {}).get("__spec__")


def _is_namespace(module: object) -> bool:
    spec = _spec_of(module)
    locations = getattr(spec, "submodule_search_locations", None)
    return locations is not None and getattr(spec, "origin", None) is None


def _origin(module: object) -> str | None:
    origin = getattr(_spec_of(module), "origin", None)
    return os.path.abspath(origin) if isinstance(origin, str) and os.path.isabs(origin) else None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
