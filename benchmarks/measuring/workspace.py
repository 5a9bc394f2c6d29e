"""Where it is measured: a temporary directory with a project, a repository and a daemon of its own.

Also makes the files: content that nobody has seen before, so that nothing can be saved by knowing it.
"""

import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import replicate
from measuring.processes import MemorySampler
from replicate import connection
from replicate.home import find_home

_BLOCK = 1 << 20
_STAMP_DISTANCE = 16 << 10
_FILES_A_DIRECTORY = 100
_STOP_TIMEOUT_S = 120.0
_REMOVING_THREADS = 8
#: Large enough to be captured as checkpoints are, not as small files are.
_FIRST_BYTES = 2 << 20


class Workspace:
    """A project directory, and a daemon whose state and repository can be begun anew."""

    def __init__(self, directory: str | None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rpl-bench-", dir=directory))
        self.project = self.root / "project"
        self.repository = self.root / "repository"
        self._home = self.root / "home"
        for name in ("DISABLED", "EXPERIMENT_ID", "REPOSITORY", "PROJECT_DIR"):
            os.environ.pop(f"REPLICATE_{name}", None)
        os.environ["REPLICATE_HOME"] = str(self._home)
        self.memory = MemorySampler(self.find_daemon)
        self.memory.start()
        # Mapped and not allocated: reads into memory that begins within a page are several times slower.
        self._buffer = mmap.mmap(-1, _BLOCK)
        self._block = mmap.mmap(-1, _BLOCK)
        self._block.write(os.urandom(_BLOCK))
        self._stamp = 0
        self.project.mkdir()

    def renew(self) -> None:
        """Forget everything but the project: a new repository, and a daemon that has just started.

        It has answered every kind of call once, so that nothing is loaded while the clock runs.
        """
        self.stop_daemon()
        for directory in (self._home, self.repository):
            shutil.rmtree(directory, ignore_errors=True)
        self.restart_daemon()

    def restart_daemon(self) -> None:
        """Another daemon process on the same state, warm as after `renew`."""
        self.stop_daemon()
        first = self.root / "project" / "first.bin"
        self.write_file(first, _FIRST_BYTES)
        with self.begin() as experiment:
            experiment.checkpoint(quiet=True)
            experiment.checkpoint(path=first.name, quiet=True)
        first.unlink()
        self.settle()

    def find_daemon(self) -> int:
        """The pid of the daemon; raises `OSError` or `ValueError` when none runs."""
        return int(find_home().lock.read_text())

    def stop_daemon(self) -> None:
        """Return when no daemon runs any more."""
        connection.stop_daemon(_STOP_TIMEOUT_S)

    def begin(self, path: str | None = None) -> replicate.Experiment:
        """A new experiment in the project."""
        project = replicate.Project(repository=f"file://{self.repository}", directory=self.project)
        return project.experiments.create(path=path, quiet=True)

    def settle(self) -> None:
        """Wait until everything is stored and written back: what comes next is not disturbed by it."""
        replicate.flush()
        os.sync()

    def empty_project(self) -> None:
        """Remove all files of the project."""
        folders = [path for path in self.project.glob("*/*") if path.is_dir() and not path.is_symlink()]
        # Each file takes a millisecond where the disk is told at once what has become free.
        with ThreadPoolExecutor(_REMOVING_THREADS) as pool:
            list(pool.map(shutil.rmtree, folders))
        shutil.rmtree(self.project)
        self.project.mkdir()

    def close(self) -> None:
        """Stop the daemon and remove everything."""
        try:
            self.memory.stop()
            self.stop_daemon()
        finally:
            shutil.rmtree(self.root)

    def write_file(self, path: Path, size_bytes: int) -> None:
        """A file with incompressible content that no other file shares."""
        with path.open("wb", buffering=0) as file:
            for offset in range(0, size_bytes, _BLOCK):
                self._renew_block()
                file.write(memoryview(self._block)[: size_bytes - offset])

    def make_tree(self, directory: Path, count: int, smallest: int, largest: int) -> None:
        """Files of even sizes in directories of a hundred each."""
        sizes = random.Random(count)
        for number in range(count):
            if number % _FILES_A_DIRECTORY == 0:
                self._renew_block()
                folder = directory / f"{number // _FILES_A_DIRECTORY:04d}"
                folder.mkdir(parents=True)
            size = sizes.randint(smallest, largest)
            begin = sizes.randrange(_BLOCK - size)
            with (folder / f"{number:06d}.bin").open("wb", buffering=0) as file:
                file.write(memoryview(self._block)[begin : begin + size])
        os.sync()

    def read_cached(self, path: Path) -> float:
        """Seconds that one pass over a file takes which is in the page cache: the limit for any reader."""
        with path.open("rb", buffering=0) as file:
            begin = time.perf_counter()
            while file.readinto(self._buffer):
                pass
            return time.perf_counter() - begin

    def _renew_block(self) -> None:
        for offset in range(0, _BLOCK, _STAMP_DISTANCE):
            self._stamp += 1
            struct.pack_into("<Q", self._block, offset, self._stamp)


class TreePass:
    """One pass over a tree by a program in C, which is compiled for this run."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "tree_pass"
        source = Path(__file__).parents[1] / "tree_pass.c"
        subprocess.run(["cc", "-O2", "-o", self._program, source], check=True)

    def walk(self, directory: Path) -> float:
        """Seconds of `nftw`."""
        return self._run("walk", directory)

    def read(self, directory: Path) -> float:
        """Seconds of `nftw` with open, read and close of every file."""
        return self._run("read", directory)

    def _run(self, mode: str, directory: Path) -> float:
        ran = subprocess.run([self._program, mode, directory], check=True, capture_output=True, text=True)
        return float(ran.stdout.split()[0])


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def progress(message: str) -> None:
    """Said to whoever waits; the results go to stdout."""
    print(f"… {message}", file=sys.stderr, flush=True)
