"""Mounts that the native engine serves from a child of the test, and ways to make their reads wait.

The child is forked, so that a test can serve what it likes; the files are looked at by this process and by
programs that it starts, never mapped into it.
"""

import errno
import json
import logging
import os
import select
import signal
import subprocess
import time
import traceback
from contextlib import suppress
from types import SimpleNamespace

import pytest

from replicate.errors import MountFailed
from replicated.mount.engine.libfuse import DEVICE
from replicated.mount.engine.native.session import serve
from replicated.mount.filesystem import Filesystem
from replicated.mount.life.mountinfo import find_mounted
from replicated.mount.options import MountOptions

PATIENCE_S = 20


def pytest_collection_modifyitems(items):
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        for item in items:
            if "natively" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=f"{DEVICE} cannot be opened here"))


class Served:
    """A mount and the process that serves it."""

    def __init__(self, directory, log, filesystem, options, prepare, finish):
        self.directory = directory
        self.log = log
        answers, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(told, filesystem, options, prepare, finish)
        os.close(told)
        with open(answers, "rb") as file:
            line = file.readline()
        answer = json.loads(line) if line else {"failed": f"it died: {log.read_text()}"}
        if "failed" in answer:
            self.wait()
            raise MountFailed(answer["failed"])
        self.report = SimpleNamespace(**answer)

    def _serve(self, told, filesystem, options, prepare, finish):
        status = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(handlers=[logging.FileHandler(self.log)], force=True)
            prepare()
            serve(
                filesystem,
                os.fsencode(self.directory),
                source_name="replicate:a,b",
                options=MountOptions(**options),
                on_mounted=lambda report: os.write(
                    told,
                    json.dumps({"passthrough": report.passthrough, "reason": report.reason}).encode() + b"\n",
                ),
            )
            finish()
            status = 0
        except MountFailed as failed:
            os.write(told, json.dumps({"failed": failed.message}).encode() + b"\n")
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    @property
    def is_mounted(self):
        return find_mounted(os.fsencode(self.directory)) is not None

    def kill(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """The exit status of the process, once it has ended."""
        pidfd = os.pidfd_open(self.pid)
        try:
            assert select.select([pidfd], [], [], PATIENCE_S)[0], "the process does not end"
        finally:
            os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = None
        return status

    def end(self):
        if self.pid is not None:
            with suppress(ProcessLookupError):
                self.kill(signal.SIGTERM)
            try:
                self.wait()
            except AssertionError:
                self.kill(signal.SIGKILL)
                self.wait()
                raise
        if self.is_mounted:
            subprocess.run(["umount", "-l", self.directory], check=True)
            raise AssertionError("the mount was left behind")


@pytest.fixture
def natively(tmp_path, memory_tree):
    """Mount a tree, a dictionary of one, or a file system; ended after the test."""
    mounts = []

    def natively(content, *, prepare=lambda: None, finish=lambda: None, directory=None, **options):
        if directory is None:
            directory = tmp_path / f"mount{len(mounts)}"
            directory.mkdir()
        if isinstance(content, (dict, tuple)):
            content = memory_tree(content)
        filesystem = content if isinstance(content, Filesystem) else Filesystem(content)
        served = Served(directory, tmp_path / f"log{len(mounts)}", filesystem, options, prepare, finish)
        mounts.append(served)
        return served

    yield natively
    for served in mounts:
        served.end()


class Gate:
    """Lets a reader of another process wait until it is opened."""

    def __init__(self, path):
        self._path = path
        os.mkfifo(path)
        self._arrived, self._arrival = os.pipe()
        self._opened = None

    def pass_through(self):
        os.write(self._arrival, b".")
        # Opening a pipe waits until somebody writes to it.
        os.close(os.open(self._path, os.O_RDONLY))

    def wait_for(self, count):
        """Return when as many have come to the gate."""
        while count:
            assert select.select([self._arrived], [], [], PATIENCE_S)[0], "nobody comes"
            count -= len(os.read(self._arrived, count))

    def open(self):
        self._opened = os.open(self._path, os.O_RDWR)

    def close(self):
        os.close(self._arrived)
        os.close(self._arrival)
        if self._opened is not None:
            os.close(self._opened)


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


@pytest.fixture
def gated(gate, memory_tree):
    """A tree whose files of the given names are read only once the gate is open."""

    def gated(content, *names):
        tree = memory_tree(content)
        for name in names:
            data = tree.find(name).content.node

            def pread(offset, length, data=data):
                gate.pass_through()
                return data[offset : offset + length]

            tree.readers[name] = SimpleNamespace(pread=pread)
        return tree

    return gated


@pytest.fixture
def eventually():
    """Wait until something is so."""

    def eventually(condition):
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it never came to be"
            time.sleep(0.01)

    return eventually


@pytest.fixture
def reading():
    """Start programs that read a file; what they got when they end. Nobody outlives the test."""
    started = []

    def reading(path, *, direct=False):
        flags = ["iflag=direct"] if direct else []
        process = subprocess.Popen(
            ["dd", f"if={path}", "bs=1M", "status=none", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield reading
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def error_of():
    """The name of the errno with which something fails; empty when it does not."""

    def error_of(attempt):
        try:
            attempt()
        except OSError as error:
            return errno.errorcode[error.errno]
        return ""

    return error_of
