"""What befalls daemon and store while a script trains: kills at random moments, a store that is no help.

Used by the training script itself, because only that knows when a moment is interesting.
"""

import signal
import threading
from contextlib import suppress
from pathlib import Path
from random import Random

from rig.daemons import signal_daemon, signal_store
from rig.oracle import Chronicle

_SIGNALED = {"daemon": signal_daemon, "store": signal_store}


class Killer:
    """Kills what a plan names, in some rounds, some time from before the call until long after it."""

    def __init__(self, kills: tuple[str, ...], chance: float, home: Path, chronicle: Chronicle) -> None:
        self._kills = [tuple(kill.split()) for kill in kills]
        self._chance = chance
        self._home = home
        self._chronicle = chronicle
        self._timers: list[threading.Timer] = []

    def arm(self, random: Random, step: int) -> None:
        """Choose whether, whom and when; called just before `checkpoint`. One kill is prepared at a time."""
        is_quiet = all(not timer.is_alive() for timer in self._timers)
        if not self._kills or not is_quiet or random.random() > self._chance:
            return
        whom, how = random.choice(self._kills)
        delay_s = random.choice([0.0, random.uniform(0, 0.02), random.uniform(0, 0.5)])
        timer = threading.Timer(delay_s, self._kill, (whom, how, step))
        self._timers.append(timer)
        timer.start()

    def join(self) -> None:
        for timer in self._timers:
            timer.join()

    def _kill(self, whom: str, how: str, step: int) -> None:
        if _SIGNALED[whom](self._home, signal.Signals[f"SIG{how}"]):
            self._chronicle.write("killed", whom=whom, how=how, since=step)


class Trouble:
    """Keeps the daemon from storing anything, until it is over."""

    def __init__(self, kind: str, home: Path, repository: Path) -> None:
        self._kind = kind
        self._home = home
        self._repository = repository
        self._away = repository.with_name(repository.name + ".away")
        self._filler = repository / "filler"
        self._is_stopped = False

    def begin(self) -> None:
        if self._kind == "repository away":
            self._repository.rename(self._away)
        elif self._kind == "repository full":
            fill(self._filler)

    def go_on(self) -> None:
        """To be called in each round: the process that stores is started on demand."""
        if self._kind == "store stopped" and not self._is_stopped:
            self._is_stopped = signal_store(self._home, signal.SIGSTOP)

    def end(self) -> None:
        if self._kind == "repository away":
            self._away.rename(self._repository)
        elif self._kind == "repository full":
            self._filler.unlink()
        elif self._is_stopped:
            signal_store(self._home, signal.SIGCONT)


def fill(filler: Path) -> None:
    """Make a file that leaves no byte of its file system free."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
