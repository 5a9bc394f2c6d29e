"""Three machines that save and remove, two that collect and two that read, frozen and killed at any request.

`MANY_MACHINES_S=60` lets each case run for so long (a few seconds otherwise), `MANY_MACHINES_SEED` is where
the seeds begin. A seed replays what happened, as far as each machine makes one request after the other.
"""

import os
import time
from collections import Counter

import pytest
from rig.many import Fleet
from rig.turns import Luck, TakingTurns, Turns
from servers import faults, s3_servers
from servers.fault_proxy import FaultProxy

from replicated import compaction, record_merging
from replicated.store.buckets import parse_bucket_url
from replicated.store.memory import MemoryStore
from replicated.store.retrying import RetryingStore
from replicated.store.s3.store import S3Store

SECONDS = float(os.environ.get("MANY_MACHINES_S", "4"))
FIRST_SEED = int(os.environ.get("MANY_MACHINES_SEED", "1"))
#: Requests of one run; then there is another one, with the next seed.
REQUESTS = 4000

pytestmark = pytest.mark.timeout(200 + 4 * SECONDS)


@pytest.fixture(autouse=True)
def _merge_soon(monkeypatch):
    """So that there is something to merge within one run."""
    monkeypatch.setattr(record_merging, "FEWEST_ANNOUNCED", 12)
    monkeypatch.setattr(record_merging, "FEWEST_SEGMENTS", 3)
    monkeypatch.setattr(compaction, "FEWEST_MERGED", 5)


@pytest.mark.parametrize("has_costly_requests", [False, True], ids=["near", "far"])
def test_everything_that_was_stored_stays_and_nothing_else_shows(tmp_path, has_costly_requests):
    def run_seed(seed, deadline):
        memory = MemoryStore()
        return run(tmp_path / str(seed), seed, memory, memory, has_costly_requests=has_costly_requests)

    run_seeds(run_seed)


def test_everything_that_was_stored_stays_on_a_bucket_that_breaks(tmp_path):
    """Every request may meet a fault, on its way or of the server; some are said to be done and are not."""

    def run_seed(seed, deadline):
        url = f"s3://many-{seed}/runs"
        direct, through = (RetryingStore(open_at(one, url)) for one in (server.url, proxy.url))
        for number, (name, fault) in enumerate(faults.PASSING_FAULTS.items()):
            if name != "flip":
                proxy.add(fault, probability=0.01, seed=100 * seed + number)
        proxy.add(faults.lie, "PUT", probability=0.02, seed=100 * seed + 99)
        try:
            return run(
                tmp_path / str(seed),
                seed,
                through,
                direct,
                has_faults=True,
                deadline=deadline,
                calm=proxy.clear,
            )
        finally:
            proxy.clear()
            through.close()
            direct.close()

    with s3_servers.moto() as server, FaultProxy(server.url) as proxy:
        run_seeds(run_seed)
        struck = Counter(one.fault for one in proxy.counted.exchanges if one.fault)
        print(f"{proxy.counted.total} requests, faults: {dict(struck)}")
    assert struck


def run_seeds(run_seed):
    """One seed after the other, until the time is over."""
    deadline = time.monotonic() + SECONDS
    happened = Counter()
    seed = FIRST_SEED
    while seed == FIRST_SEED or time.monotonic() < deadline:
        happened.update(run_seed(seed, deadline))
        seed += 1
    for what in ("saved", "read", "collections"):
        assert happened[what], what


def run(directory, seed, store, untroubled, *, has_faults=False, deadline=None, calm=None, **capabilities):
    """One fleet, until it made its requests or the time is over; what happened."""
    turns = Turns(seed, Luck())
    fleet = Fleet(
        directory,
        seed,
        lambda machine: TakingTurns(store, turns, machine, **capabilities),
        has_faults=has_faults,
    )

    def is_enough():
        is_late = deadline is not None and time.monotonic() > deadline
        return bool(fleet.failures) or turns.count >= REQUESTS or (is_late and turns.count >= REQUESTS / 8)

    threads = fleet.start(turns.join, turns.leave)
    try:
        turns.run(is_enough)
        if calm is not None:
            calm()
        fleet.is_resting = True
        turns.calm()
        turns.run(lambda: bool(fleet.failures))
    finally:
        fleet.is_stopped = True
        turns.stop()
        for thread in threads:
            thread.join()
    print(f"seed {seed}: {dict(fleet.model.happened)}; requests: {dict(turns.happened)}")
    try:
        fleet.judge(untroubled)
    except BaseException:
        print(f"seed {seed}", *turns.history, sep="\n")
        raise
    return fleet.model.happened


def open_at(endpoint, url):
    environment = {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}
    return S3Store(parse_bucket_url(url), create=True, environment=environment)
