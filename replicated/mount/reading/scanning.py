"""Small files that will be read next: fetched together when files are read in the order of their directory.

`open_files` asks here before it reads a small file. Who reads three neighbours one after the other (`tar`,
`grep -r`, a data loader) gets the files that follow from a few large reads of the store, made in the
background. Invariants: at most `MEMORY_BYTES` are held or on their way; what goes wrong, or was guessed
wrong, costs a reader nothing, because what is not here is read as if this did not exist.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from replicated.mount.reading.background import Workers

if TYPE_CHECKING:
    from replicated.tree import Node

#: Files up to this size are fetched with others.
SMALL_FILE_BYTES: Final = 1 << 20
#: What may be held or on its way, of all that are being read.
MEMORY_BYTES: Final = 8 << 20
#: What is fetched together, at first and at most.
FIRST_FILES: Final = 64
MAX_FILES: Final = 1024
FIRST_BYTES: Final = 512 << 10
MAX_BYTES: Final = 2 << 20
#: How many fetches are made before somebody has taken something of the last one.
AHEAD_NEAR: Final = 1
AHEAD_FAR: Final = 2
#: Runs of neighbours that are told apart: of several readers, or of the workers of a data loader.
MAX_RUNS: Final = 8
#: Readers may pass over so many entries of a directory, such as those with another suffix.
MAX_STEP: Final = 4
#: A next neighbour counts two, one behind a gap counts one; with so much a run is believed, which three files
#: in a row are enough for. It takes more of it after wrong guesses: random readers of a small directory meet
#: neighbours by chance.
MIN_SCORE: Final = 4
MAX_SCORE: Final = 64
#: After this somebody who waits for a fetch reads by himself, and gets the error that there may be.
MAX_WAIT_S: Final = 5.0
#: And after this, who waits until it is settled what will be fetched.
MAX_PLAN_WAIT_S: Final = 0.1

ReadFiles: TypeAlias = Callable[["Sequence[Node]"], "list[bytes]"]
Following: TypeAlias = Callable[[int, int], "list[tuple[int, Node]]"]


class _Batch:
    """Files that are fetched together; `contents` has those that came and were not taken yet."""

    def __init__(self, run: _Run, files: Sequence[tuple[int, Node]]) -> None:
        self.run = run
        self.files = files
        self.left = dict(files)
        self.contents: dict[int, bytes] = {}
        self.came = threading.Event()
        self.held_bytes = sum(node.size for _, node in files)

    @property
    def is_touched(self) -> bool:
        """Whether somebody has asked for one of its files."""
        return len(self.left) < len(self.files)


class _Run:
    """Neighbours that were read one after the other, and what was fetched because of that."""

    def __init__(self, position: int) -> None:
        #: The inode that was read last, and the last one that was fetched or read.
        self.position = position
        self.frontier = position
        self.score = 0
        self.max_files = FIRST_FILES
        self.max_bytes = FIRST_BYTES
        self.batches: deque[_Batch] = deque()
        #: There while a worker looks for what comes next, and set after that.
        self.plan: threading.Event | None = None
        #: Whether nothing comes after `frontier`.
        self.is_over = False


class SmallFiles:
    """The contents of small files that were fetched before they were asked for.

    `read_files` gives the contents of several files of the source, `following` the files behind one in its
    directory. May be used from several threads; one lock guards everything, and is a leaf.
    """

    def __init__(self, read_files: ReadFiles, following: Following, *, is_near: bool) -> None:
        self._read_files = read_files
        self._following = following
        self._ahead = AHEAD_NEAR if is_near else AHEAD_FAR
        #: What comes next is settled at once, also while all who fetch wait for the store.
        self._planners = Workers("scan-plan", 1, capacity=MAX_RUNS)
        self._fetchers = Workers("scan-fetch", self._ahead, capacity=2 * MAX_RUNS)
        self._lock = threading.Lock()
        #: Those used last come last.
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        self._fetched: dict[int, _Batch] = {}
        self._held_bytes = 0
        self._needed_score = MIN_SCORE
        #: Whether the last scan went on to the end of a directory: the next one begins at once.
        self._is_next_expected = False

    def take(self, inode: int, node: Node) -> bytes | None:
        """The whole content of a file that is about to be read, or None when it is not here.

        Waits for one that is on its way. What was given is not here any more.
        """
        if node.size > SMALL_FILE_BYTES:
            return None
        with self._lock:
            batch = self._fetched.pop(inode, None)
            plan = self._find_plan(inode) if batch is None else None
        # Who is faster than the planning would read what is about to be fetched. One wait is enough.
        if plan is not None and not plan.wait(MAX_PLAN_WAIT_S):
            plan.set()
        with self._lock:
            batch = batch or self._fetched.pop(inode, None)
            run = self._note_read(inode) if batch is None else self._note_taken(batch, inode)
            if run is not None:
                self._extend(run)
        if batch is None or not batch.came.wait(MAX_WAIT_S):
            return None
        with self._lock:
            content = batch.contents.pop(inode, None)
            if content is None:
                return None
            batch.held_bytes -= len(content)
            self._held_bytes -= len(content)
        return content

    def close(self) -> None:
        """End the threads and give up what is held; may be called twice."""
        self._planners.close()
        self._fetchers.close()
        with self._lock:
            for run in list(self._runs):
                self._forget_run(run)

    # What follows up to the next heading is called with the lock held.

    def _find_plan(self, inode: int) -> threading.Event | None:
        """What says that it is settled which files are fetched next, if this may be one of them."""
        for run in reversed(self._runs):
            if run.plan is not None and 0 < inode - run.position <= MAX_STEP:
                return run.plan
        return None

    def _note_read(self, inode: int) -> _Run | None:
        """The run that a file which was not fetched belongs to, if that is to be believed."""
        for run in reversed(self._runs):
            step = inode - run.position
            if step == 0:
                return None
            if 0 < step <= MAX_STEP:
                run.position = inode
                run.score = min(MAX_SCORE, run.score + (2 if step == 1 else 1))
                self._runs.move_to_end(run)
                break
        else:
            run = _Run(inode)
            if self._is_next_expected:
                self._is_next_expected = False
                run.score = self._needed_score
            self._runs[run] = None
            if len(self._runs) > MAX_RUNS:
                self._forget_run(next(iter(self._runs)))
        if run.position > run.frontier:
            run.frontier = run.position
            run.is_over = False
        return run if run.score >= self._needed_score else None

    def _note_taken(self, batch: _Batch, inode: int) -> _Run | None:
        run = batch.run
        del batch.left[inode]
        if run not in self._runs:
            return None
        run.position = max(run.position, inode)
        self._runs.move_to_end(run)
        if batch not in run.batches:
            # It failed since it was looked up.
            return None
        if run.is_over and inode == run.frontier:
            self._is_next_expected = True
        # Several readers may be in the batch before; what lies further back was passed over.
        touched = [position for position, other in enumerate(run.batches) if other.is_touched]
        for _ in range(touched[-1] - 1):
            self._forget(run.batches[0])
        return run

    def _extend(self, run: _Run) -> None:
        """Have a worker fetch what comes next, if it is time for that."""
        if run.plan is not None or run.is_over:
            return
        if sum(not batch.is_touched for batch in run.batches) < self._ahead:
            run.plan = threading.Event()
            if not self._planners.submit(lambda: self._plan(run)):
                run.plan = None

    def _make_room(self, size_bytes: int, run: _Run) -> bool:
        """Give up what was not used for longest; False when that is not enough."""
        for batch in list(self._iter_disposable(run)):
            if self._held_bytes + size_bytes <= MEMORY_BYTES:
                break
            self._forget(batch)
        return self._held_bytes + size_bytes <= MEMORY_BYTES

    def _iter_disposable(self, run: _Run) -> Iterator[_Batch]:
        """What came and is not about to be taken in `run`, the oldest first."""
        for other in self._runs:
            if other is not run:
                yield from (batch for batch in other.batches if batch.came.is_set())
        touched = [batch for batch in run.batches if batch.is_touched and batch.came.is_set()]
        yield from touched[:-1]

    def _forget_run(self, run: _Run) -> None:
        for batch in list(run.batches):
            self._forget(batch)
        self._runs.pop(run, None)

    def _forget(self, batch: _Batch) -> None:
        """Give up a batch, and learn from how much of it was used."""
        run = batch.run
        run.batches.remove(batch)
        for inode in batch.left:
            self._fetched.pop(inode, None)
        if batch.came.is_set():
            # Else that is done when it comes.
            self._release(batch)
        if len(batch.left) * 4 > len(batch.files) * 3:
            self._needed_score = min(MAX_SCORE, self._needed_score * 2)
            run.score = 0
            run.max_files, run.max_bytes = FIRST_FILES, FIRST_BYTES
        elif len(batch.left) * 4 < len(batch.files):
            self._needed_score = max(MIN_SCORE, self._needed_score // 2)

    def _release(self, batch: _Batch) -> None:
        self._held_bytes -= batch.held_bytes
        batch.held_bytes = 0
        batch.contents.clear()

    # In the threads of this

    def _plan(self, run: _Run) -> None:
        """Settle what is fetched next, and have it fetched."""
        plan = run.plan
        assert plan is not None, "made when this was submitted"
        try:
            frontier, max_files = run.frontier, run.max_files
            files = self._following(frontier, max_files)
            with self._lock:
                run.plan = None
                batch = self._enter(run, files, is_end=len(files) < max_files)
                if batch is not None:
                    if self._fetchers.submit(lambda: self._fetch(batch)):
                        self._extend(run)
                    else:
                        self._end(batch, [])
        finally:
            with self._lock:
                if run.plan is plan:
                    run.plan = None
            plan.set()

    def _fetch(self, batch: _Batch) -> None:
        contents: list[bytes] = []
        try:
            contents = self._read_files([node for _, node in batch.files])
        finally:
            with self._lock:
                self._end(batch, contents)

    # With the lock held

    def _end(self, batch: _Batch, contents: Sequence[bytes]) -> None:
        """Let those who wait for a batch have what came of it: nothing when that failed."""
        run = batch.run
        if len(contents) == len(batch.files) and batch in run.batches:
            batch.contents = {
                inode: content for (inode, _), content in zip(batch.files, contents, strict=True)
            }
        else:
            # It failed, or was given up meanwhile.
            for inode in batch.left:
                if self._fetched.get(inode) is batch:
                    del self._fetched[inode]
            if batch in run.batches:
                run.batches.remove(batch)
                run.score = 0
            self._release(batch)
        batch.came.set()

    def _enter(self, run: _Run, files: Sequence[tuple[int, Node]], *, is_end: bool) -> _Batch | None:
        """A batch of those files that are worth it."""
        if self._planners.is_closed or run not in self._runs:
            return None
        chosen, size_bytes, is_all = self._choose(run, files)
        if not self._make_room(size_bytes, run):
            return None
        run.is_over = is_all and is_end
        if not chosen:
            self._is_next_expected |= run.is_over
            run.frontier = max([run.frontier, *(inode for inode, _ in files[-1:])])
            return None
        run.frontier = chosen[-1][0]
        run.max_files = min(MAX_FILES, max(FIRST_FILES, 2 * len(chosen)))
        run.max_bytes = min(MAX_BYTES, 2 * run.max_bytes)
        batch = _Batch(run, chosen)
        self._held_bytes += size_bytes
        run.batches.append(batch)
        self._fetched.update((inode, batch) for inode, _ in chosen)
        return batch

    def _choose(
        self, run: _Run, files: Sequence[tuple[int, Node]]
    ) -> tuple[list[tuple[int, Node]], int, bool]:
        """Those of the files that are worth fetching, their size, and whether all were looked at."""
        active = sum(1 for other in self._runs if other.batches or other is run)
        # Each run may have a batch that is being taken, the one before, and those ahead.
        limit = min(run.max_bytes, MEMORY_BYTES // (active * (self._ahead + 2)))
        chosen: list[tuple[int, Node]] = []
        size_bytes = 0
        for inode, node in files:
            if inode <= run.position or inode in self._fetched or not 0 < node.size <= SMALL_FILE_BYTES:
                continue
            if chosen and size_bytes + node.size > limit:
                return chosen, size_bytes, False
            size_bytes += node.size
            chosen.append((inode, node))
        return chosen, size_bytes, True
