"""The composition root: builds every object of the daemon once, and takes them down in reverse.

One daemon a home, guarded by a lock that is held from before the socket exists until the process ends:
without it, a second server would take the socket over without a word. All that must survive is in the
journal and the spool, so the daemon may be killed at any moment; a clean stop only saves work.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import logging.handlers
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from replicate._version import __version__
from replicate.errors import DaemonUnavailable
from replicate.home import PRIVATE_MODE, Home, make_private
from replicated.admission import Admission
from replicated.browse import Browser
from replicated.collecting.running import Collecting
from replicated.experiments import Experiments
from replicated.heap import keep_memory
from replicated.heartbeats import Heartbeats
from replicated.intake import Intake
from replicated.jobs import Frozen, Jobs
from replicated.journal import Journal
from replicated.liveness import RunWatcher
from replicated.mount.life.persisting import leased_snapshots
from replicated.mount.life.supervising import Supervisor
from replicated.mount.life.table import MountTable
from replicated.patience import Patience
from replicated.reaching import Access
from replicated.removal import Removal
from replicated.repositories import OpenRepositories
from replicated.rpc import RpcServer, Services
from replicated.snapshot.capture import Capturer
from replicated.snapshot.held import HeldFiles
from replicated.snapshot.recovery import recover
from replicated.snapshot.spool import Spool
from replicated.snapshot.tree_caches import TreeCaches
from replicated.snapshot.watch import TreeWatches
from replicated.sqlite import DatabaseUnusable
from replicated.standings import Standings
from replicated.storing import Storing

#: A daemon that was started on demand and has had nothing to do for this long leaves.
IDLE_EXIT_S = 600.0
#: How long a stop waits for requests that are being answered. Captures that take longer are repeated by the
#: library with the next daemon; that one, and the library, wait longer than this.
STOP_GRACE_S = 5.0
#: How long a stop goes on to copy what is leased before it leaves the rest to the next daemon.
SECURE_PATIENCE_S = 10.0
#: How long a start waits for a daemon that is leaving.
LOCK_PATIENCE_S = 20.0
#: sun_path of a Unix socket holds 108 bytes, the last of them NUL.
MAX_SOCKET_PATH = 107
#: SQLite's limit is 512, with room for the suffix of its log.
MAX_DATABASE_PATH = 500

#: A request waits at most this long for the interpreter while another thread computes (5 ms otherwise).
_SWITCH_INTERVAL_S = 0.001

_LOG_BYTES = 5 << 20
_LOG_FILES = 3

_log = logging.getLogger(__name__)


def serve(home: Home, *, on_demand: bool, idle_exit_s: float = IDLE_EXIT_S, upload_limit: int = 0) -> None:
    """Run the daemon of a home until it is told to stop, or is idle when it was started on demand.

    `upload_limit` bounds the bytes that are sent to a repository in a second; 0: no limit.

    Raises `DaemonUnavailable` when another daemon owns the home or its state cannot be used.
    """
    keep_memory()
    if len(os.fsencode(home.journal)) > MAX_DATABASE_PATH:
        raise DaemonUnavailable(
            f"the path of the state directory is too long for SQLite: {home.state}",
            hint="set REPLICATE_HOME to a shorter path",
        )
    for directory in (home.state, home.spool, home.cache, home.logs):
        _close_to_others(directory)
    for directory in (home.run, home.state, home.spool, home.cache, home.logs):
        make_private(directory)
    with _owning(home):
        _start_logging(home)
        _raise_descriptor_limit()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        stop = threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        _log.info("replicated %s starts, pid %d", __version__, os.getpid())
        try:
            with ExitStack() as stack:
                is_idle = _build(home, stack, stop, upload_limit)
                socket_inode = os.lstat(home.socket).st_ino
                while not stop.wait(1.0):
                    if not _is_inode(home.socket, socket_inode):
                        # Nobody can reach us any more: make room for a daemon that can be reached.
                        _log.warning("the socket was removed, leaving")
                        stop.set()
                    if on_demand and is_idle() > idle_exit_s:
                        _log.info("idle, leaving")
                        stop.set()
        except Exception:
            _log.exception("the daemon ends because of an error")
            raise
        _log.info("stopped")
        logging.shutdown()
        # Threads of requests that were cut off may still be writing: the lock must hold until they have
        # ended, and they would hold up a normal exit for as long as they please.
        os._exit(0)


class _Idleness:
    """How long there has been nothing to do."""

    def __init__(self, server: RpcServer, journal: Journal, jobs: Jobs, mounts: MountTable) -> None:
        self._server = server
        self._journal = journal
        self._jobs = jobs
        self._mounts = mounts
        self._busy_at = time.monotonic()

    def __call__(self) -> float:
        since_request = self._server.activity.idle_s()
        # Asked only when it could matter: these read the database and the mount table.
        if since_request > 1.0 and self._is_busy():
            self._busy_at = time.monotonic()
        return min(since_request, time.monotonic() - self._busy_at)

    def _is_busy(self) -> bool:
        if self._journal.runs() or not self._mounts.is_idle():
            return True
        # Jobs that only wait for an unreachable repository are safe in the journal.
        return bool(self._journal.captured()) and not self._jobs.progress().waiting_because


def _build(home: Home, stack: ExitStack, stop: threading.Event, upload_limit: int) -> _Idleness:
    """Make everything, in the order in which data flows; the stack takes it down in reverse."""
    journal = _open_journal(home)
    stack.callback(journal.close)
    journal.forget_finished(time.time_ns())
    spool = Spool(home.spool)
    _clean_spool(spool, journal)
    held = HeldFiles(spool.path)
    held.start()
    stack.callback(held.stop)
    # At once: what the last daemon held, the training scripts may change at any moment.
    lost = recover(journal, spool, held)
    watches = TreeWatches()
    watches.start()
    stack.callback(watches.stop)
    standings = Standings(home.state / "repositories.db", time.time_ns)
    stack.callback(standings.close)
    for url in standings.troubles().keys() - {job.repository for job in journal.captured()}:
        standings.note_well(url)  # nothing waits for it any more
    access = Access()
    repositories = OpenRepositories(home.cache, access=access, standings=standings, patience=Patience())
    stack.callback(repositories.close)
    tree_caches = TreeCaches(home.cache / "trees", repositories)
    stack.callback(tree_caches.close)
    capturer = Capturer(spool, held, watches, private=(home.state, home.cache, home.run, home.logs))
    stack.callback(capturer.stop)
    jobs = Jobs(
        journal,
        repositories,
        Frozen(spool, held, capturer),
        lambda: Storing(held, home.cache, access),
        standings,
        lost=lost,
        upload_limit=upload_limit,
    )
    experiments = Experiments(journal, repositories, home.cache / "catalogs")
    stack.callback(experiments.close)
    host = socket.gethostname()
    # A home on a network file system may have daemons on several machines, one after the other.
    daemon_id = hashlib.sha256(f"{standings.daemon_id()}/{host}".encode()).hexdigest()
    heartbeats = Heartbeats(journal, repositories, daemon_id, host)
    watcher = RunWatcher(on_gone=lambda run, status: intake.process_gone(run, status))
    intake = Intake(
        journal,
        capturer,
        repositories,
        tree_caches,
        Admission(journal, jobs.wait_for_change, jobs.waiting_because),
        wake=jobs.wake,
        watch=watcher.watch,
        forget=watcher.forget,
        tell_runs=heartbeats.wake,
    )
    mounts = MountTable(home, access)
    mounts.adopt()
    supervisor = Supervisor(mounts)
    supervisor.start()
    stack.callback(supervisor.stop)
    server = RpcServer(
        Services(
            home_spool=spool,
            held=held,
            journal=journal,
            intake=intake,
            jobs=jobs,
            repositories=repositories,
            experiments=experiments,
            browser=Browser(experiments, repositories, home.cache),
            removal=Removal(journal, capturer, jobs, experiments, repositories, mounts),
            collecting=Collecting(
                home.cache, journal, repositories, access, lambda url: leased_snapshots(home, url)
            ),
            mounts=mounts,
            access=access,
            standings=standings,
            request_stop=stop.set,
        )
    )
    stack.callback(jobs.secure_all, SECURE_PATIENCE_S)
    stack.callback(jobs.stop)
    jobs.start()
    watcher.start()
    stack.callback(watcher.stop)
    stack.callback(heartbeats.stop)
    for run in journal.runs():
        watcher.watch(run)
        heartbeats.wake(run.repository)
    _listen(home, server, stack)
    return _Idleness(server, journal, jobs, mounts)


def _listen(home: Home, server: RpcServer, stack: ExitStack) -> None:
    path = str(home.socket)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        descriptor = os.open(home.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        path = f"/proc/self/fd/{descriptor}/{home.socket.name}"
    # Left by a daemon that was killed; we hold the lock, so nobody listens on it.
    home.socket.unlink(missing_ok=True)
    server.start(path)
    home.socket.chmod(0o600)

    inode = os.lstat(home.socket).st_ino

    def stop_listening() -> None:
        # First the name, so that clients who come now start the next daemon, which waits for the lock.
        if _is_inode(home.socket, inode):
            home.socket.unlink(missing_ok=True)
        server.stop(STOP_GRACE_S)

    stack.callback(stop_listening)


@contextmanager
def _owning(home: Home) -> Iterator[None]:
    """Hold the lock of a home; its file holds our pid. Raises `DaemonUnavailable` when another does."""
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if _is_served(home) or time.monotonic() > deadline:
                    owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "?"
                    raise DaemonUnavailable(
                        f"another replicated (pid {owner}) owns {home.run}",
                        hint="`replicate daemon stop` stops it",
                        fields={"pid": owner},
                    ) from None
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _is_served(home: Home) -> bool:
    """Whether somebody listens on the socket (as opposed to a daemon that is just leaving)."""
    directory = os.open(home.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(f"/proc/self/fd/{directory}/{home.socket.name}")
            return True
    except OSError:
        return False
    finally:
        os.close(directory)


def _open_journal(home: Home) -> Journal:
    try:
        return Journal(home.journal)
    except DatabaseUnusable as error:
        raise DaemonUnavailable(
            f"the journal cannot be used: {error}",
            hint=f"nothing was changed; move {home.journal} away to begin a new one"
            " (what it had not stored yet is lost then)",
        ) from error


def _clean_spool(spool: Spool, journal: Journal) -> None:
    """Remove what captures that were never acknowledged, or jobs that are finished, left behind."""
    needed = {job.id for job in journal.captured() if job.has_files}
    for identifier in spool.identifiers():
        if identifier not in needed:
            spool.remove(identifier)


def _close_to_others(directory: Path) -> None:
    """Make a directory of ours private again that others may only read, as a careless chmod leaves it."""
    with suppress(OSError):
        info = os.lstat(directory)
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022:
            directory.chmod(PRIVATE_MODE)


def _is_inode(path: Path, inode: int) -> bool:
    try:
        return os.lstat(path).st_ino == inode
    except OSError:
        return False


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _start_logging(home: Home) -> None:
    handler = logging.handlers.RotatingFileHandler(
        home.log_file,
        maxBytes=_LOG_BYTES,
        backupCount=_LOG_FILES,
        encoding="utf-8",
        errors="backslashreplace",
    )
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(threadName)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
