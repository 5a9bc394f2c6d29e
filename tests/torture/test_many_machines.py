"""Three machines that save and remove, two that collect and two that read, frozen and killed at any request.

`MANY_MACHINES_S=60` lets each case run for so long (a few seconds otherwise), `MANY_MACHINES_SEED` is where
the seeds begin. A seed replays what happened, as far as each machine makes one request after the other.
"""

import os
import time

import pytest
from rig.many import Fleet
from rig.turns import Luck, TakingTurns, Turns

from replicated.store.memory import MemoryStore

SECONDS = float(os.environ.get("MANY_MACHINES_S", "4"))
FIRST_SEED = int(os.environ.get("MANY_MACHINES_SEED", "1"))
#: Requests of one run; then there is another one, with the next seed.
REQUESTS = 4000


@pytest.mark.timeout(60 + 3 * SECONDS)
@pytest.mark.parametrize("has_costly_requests", [False, True], ids=["near", "far"])
def test_everything_that_was_stored_stays_and_nothing_else_shows(tmp_path, has_costly_requests):
    deadline = time.monotonic() + SECONDS
    seed = FIRST_SEED
    while seed == FIRST_SEED or time.monotonic() < deadline:
        run(tmp_path / str(seed), seed, has_costly_requests)
        seed += 1


def run(directory, seed, has_costly_requests):
    memory = MemoryStore()
    turns = Turns(seed, Luck())

    def make_store(machine):
        return TakingTurns(memory, turns, machine, has_costly_requests=has_costly_requests)

    fleet = Fleet(directory, seed, make_store, collect=None, has_faults=False)
    threads = fleet.start(turns.join, turns.leave)
    try:
        turns.run(lambda: turns.count >= REQUESTS or bool(fleet.failures))
        fleet.is_resting = True
        turns.calm()
        turns.run(lambda: bool(fleet.failures))
    finally:
        fleet.is_stopped = True
        turns.stop()
        for thread in threads:
            thread.join()
    print(f"seed {seed}: {dict(fleet.model.happened)}, {dict(turns.happened)}")
    try:
        fleet.judge(memory)
    except BaseException:
        print(f"seed {seed}", *turns.history, sep="\n")
        raise
    assert fleet.model.happened["saved"]
    assert fleet.model.happened["read"]
