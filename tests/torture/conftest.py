"""File systems and sites for the tests, taken away after them whatever happened there."""

import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# The rig is shared by the tests and by the scripts that they run, which find it in the same way.
sys.path.insert(0, str(Path(__file__).parent))

from rig import file_systems, sites
from rig.daemons import stop_daemon


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(2 * sites.DEADLINE_S))


@pytest.fixture(scope="session", autouse=True)
def _termination_cleans_up() -> Iterator[None]:
    """A run that is told to end unmounts what it mounted first."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def directory_on() -> Iterator[Callable[[str], Path | None]]:
    """Where a file system is mounted, by name; None for `here`. Made when it is first asked for."""
    made: dict[str, Path | None] = {"here": None}
    with ExitStack() as stack:

        def find(name: str) -> Path | None:
            if name not in made:
                try:
                    made[name] = stack.enter_context(file_systems.mounted(name))
                except file_systems.Unavailable as reason:
                    pytest.skip(str(reason))
            return made[name]

        yield find


@pytest.fixture(scope="session")
def reader_home() -> Iterator[Path]:
    """A home whose daemon knows nothing but the repositories that it reads."""
    directory = Path(tempfile.mkdtemp(prefix="rpl-"))
    yield directory
    stop_daemon(directory)
    shutil.rmtree(directory)


@pytest.fixture
def make_tmpfs() -> Iterator[Callable[[int], Path]]:
    """File systems of a few bytes, to be filled."""
    with ExitStack() as stack:

        def make(size_bytes: int) -> Path:
            try:
                return stack.enter_context(file_systems.mounted("tmpfs", size_bytes))
            except file_systems.Unavailable as reason:
                pytest.skip(str(reason))

        yield make


@pytest.fixture
def make_site(directory_on, make_tmpfs, reader_home, tmp_path) -> Iterator[Callable[..., sites.Site]]:
    """Sites by the name of their file system, with the home and the repository elsewhere if wanted.

    Their daemons end before any file system goes, whichever it is.
    """
    made = []

    def make(name: str = "here", **elsewhere: Path) -> sites.Site:
        chronicle = tmp_path / f"chronicle-{len(made)}"
        site = sites.make_site(directory_on(name), name, reader_home, chronicle)
        made.append(dataclasses.replace(site, **elsewhere))
        return made[-1]

    yield make
    for site in made:
        stop_daemon(site.home)
        shutil.rmtree(site.project.parent)


@pytest.fixture
def site(make_site) -> sites.Site:
    """A site where temporary files lie."""
    return make_site()
