"""The program that stores snapshots for a daemon: `replicated store-process`, started by `storing`.

All that costs processor time, memory and disk is done here, at the lowest priority, so that the daemon
answers at once while it goes on. One ingest at a time, as the daemon asks; it keeps nothing that matters
and may be killed at any moment. It leaves after a minute without work, and with the daemon.

Three threads talk to the daemon: one receives everything, one (the main one) ingests and reports, and
any may write to the log.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple

from replicate.ids import SnapshotId
from replicated.heap import keep_memory
from replicated.reaching import Access
from replicated.repositories import OpenRepositories
from replicated.snapshot import store_channel
from replicated.snapshot.entries import pack_root, read_entries
from replicated.snapshot.frozen import FrozenFiles
from replicated.snapshot.ingest import ingest
from replicated.snapshot.keyframes import Keyframes
from replicated.snapshot.spool import Spool
from replicated.snapshot.store_channel import Channel, ChannelClosed, Message, StoredTree
from replicated.snapshot.treecache import TreeCache
from replicated.store.limited import LimitedStore, UploadInterrupted, UploadLimit
from replicated.store.retrying import WORKER_PATIENCE_S

#: Without work for so long it leaves, and its memory with it.
IDLE_EXIT_S: Final = 60.0
#: Progress is reported so often.
_REPORT_S: Final = 0.1
#: While an answer is waited for, it is asked so often whether it is still wanted.
_POLL_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1
_MAX_LOG_TEXT: Final = 8 << 10


def main(argv: Sequence[str]) -> int:
    """Serve the daemon at the other end of the socket; the exit status."""
    options = _parse(argv)
    _die_with(options.parent)
    # The daemon blocks some for its leases, and they are inherited.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.enable()
    keep_memory()
    channel = Channel(socket.socket(fileno=options.socket))
    _start_logging(channel)
    with mmap.mmap(options.flags, 0, prot=mmap.PROT_READ) as flags, suppress(ChannelClosed):
        _StoreProcess(channel, flags, options.cache, options.idle_exit).run()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="replicated store-process", description=__doc__)
    parser.add_argument("--socket", required=True, type=int, help="descriptor of the socket to the daemon")
    parser.add_argument("--flags", required=True, type=int, help="descriptor of the flags of held files")
    parser.add_argument("--cache", required=True, type=Path, help="directory of the user's caches")
    parser.add_argument("--parent", required=True, type=int, help="pid of the daemon")
    parser.add_argument("--urgent", action="store_true", help="somebody waits: a higher priority")
    parser.add_argument("--idle-exit", type=float, default=IDLE_EXIT_S, metavar="SECONDS")
    return parser.parse_args(argv)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process with the thread that started it; the end of the socket does too."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


class _Caches(NamedTuple):
    """What is remembered of one repository between snapshots."""

    key: tuple[str, str]
    trees: TreeCache
    keyframes: Keyframes


class _Aborted(Exception):
    """The daemon does not want the snapshot any more."""


class _StoreProcess:
    def __init__(self, channel: Channel, flags: mmap.mmap, cache: Path, idle_exit_s: float) -> None:
        self._channel = channel
        self._flags = flags
        self._cache = cache
        self._idle_exit_s = idle_exit_s
        self._limit = UploadLimit()
        self._access = Access()
        self._repositories = OpenRepositories(
            cache,
            wrap=lambda store: LimitedStore(store, self._limit),
            access=self._access,
            store_patience_s=WORKER_PATIENCE_S,
        )
        self._caches: _Caches | None = None
        #: Filled by the thread that receives.
        self._requests: SimpleQueue[Message] = SimpleQueue()
        self._answers: SimpleQueue[Message] = SimpleQueue()
        self._is_aborted = threading.Event()
        self._reported_at = 0.0

    def run(self) -> None:
        """Serve until there was nothing to do for long; raises `ChannelClosed`."""
        threading.Thread(target=self._receive, name="receive", daemon=True).start()
        while True:
            try:
                request = self._requests.get(timeout=self._idle_exit_s)
            except Empty:
                return
            self._channel.send(*self._answer(request))

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                assert message is not None, "it waits for ever"
                if message.kind == store_channel.INGEST:
                    self._is_aborted.clear()
                    self._limit.set(message.values[-1])
                    self._requests.put(message)
                elif message.kind == store_channel.ACCESS:
                    self._access.note(*message.values)
                elif message.kind == store_channel.ABORT:
                    self._is_aborted.set()
                    self._limit.interrupt()
                else:
                    self._answers.put(message)
        except ChannelClosed:
            # Nobody waits for anything any more, and what is half written counts for nothing.
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _answer(self, request: Message) -> tuple[Any, ...]:
        try:
            stored = self._ingest(*request.values[:-1])
            return store_channel.DONE, stored.generation, *pack_root(stored.root)
        except (_Aborted, UploadInterrupted):
            return (store_channel.ABORTED,)
        except ChannelClosed:
            raise
        except Exception as error:
            return store_channel.describe_failure(error)

    def _ingest(
        self, url: str, experiment: str, snapshot: str, entries: bytes, spool_directory: bytes
    ) -> StoredTree:
        spool = Path(os.fsdecode(spool_directory))
        pieces = [entries] if entries else Spool(spool.parent).read_entries(spool.name)
        repository = self._repositories.get(url)
        header, records = read_entries(pieces)
        caches = self._find_caches(url, repository.id)
        with FrozenFiles(spool, self._open_held, self._flags) as files:
            return ingest(
                repository,
                SnapshotId(snapshot),
                header,
                records,
                files,
                caches.trees,
                self._on_progress,
                keyframes=caches.keyframes,
                experiment=experiment,
            )

    def _find_caches(self, url: str, repository_id: str) -> _Caches:
        """What is remembered of a repository; of the last one only, nearly always the same."""
        key = (url, repository_id)
        if self._caches is None or self._caches.key != key:
            if self._caches is not None:
                self._caches.trees.close()
                self._caches.keyframes.close()
            trees = TreeCache(self._cache / "trees", repository_id, url)
            trees.prune(time.time_ns())
            keyframes = Keyframes(self._cache / "keyframes", repository_id, url)
            keyframes.prune()
            self._caches = _Caches(key, trees, keyframes)
        return self._caches

    def _open_held(self, number: int) -> tuple[int, int | None]:
        self._channel.send(store_channel.OPEN_HELD, number)
        while True:
            self._raise_if_aborted()
            with suppress(Empty):
                answer = self._answers.get(timeout=_POLL_S)
                break
        if answer.kind != store_channel.HELD:
            raise store_channel.failure_of(answer)
        assert answer.descriptor is not None, "the descriptor comes with the answer"
        return answer.descriptor, answer.values[0]

    def _on_progress(self, bytes_done: int) -> None:
        self._raise_if_aborted()
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_S:
            self._reported_at = now
            self._channel.send(store_channel.PROGRESS, bytes_done)

    def _raise_if_aborted(self) -> None:
        if self._is_aborted.is_set():
            raise _Aborted


class _ChannelHandler(logging.Handler):
    """Passes records on to the daemon, which owns the log file."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        try:
            text = self.format(record)[:_MAX_LOG_TEXT]
            self._channel.send(store_channel.LOG, record.levelno, record.name, text)
        except ChannelClosed:
            pass  # nobody is there to read it
        except Exception:
            self.handleError(record)


def _start_logging(channel: Channel) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(_ChannelHandler(channel))
