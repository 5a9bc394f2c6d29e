"""Buckets that lie, lag, cut and flip: nothing wrong is ever shown, and nothing is lost."""

import functools

import pytest
from object_storage.machines import model, wait_until
from servers import faults

SIZE = 300_000
SEEDS = range(1, 4)


def assert_right(machine, ids, seed):
    for step, checkpoint in enumerate(ids[1:]):
        done = machine.run("cat", checkpoint, "model.pt", text=False)
        assert done.stdout == model(seed, step, SIZE), done.stderr


@pytest.mark.parametrize("kind", ["packs", "index", "records", "announcements"])
def test_what_a_liar_says_is_not_believed(machine, make_machine, proxy, kind):
    """The files that were captured are given up only when the bucket really has them."""
    pattern = {
        "packs": r"/packs/",
        "index": r"/(log/)?index/",
        "records": r"/(checkpoints|experiments|snapshots)/",
        "announcements": r"/log/new/",
    }[kind]
    machine.train(1, SIZE, 9)
    machine.flush()
    rule = proxy.add(faults.lie, "PUT", pattern, times=2)
    ids = machine.train(2, SIZE)
    machine.flush()
    assert rule.hits == 2 or kind == "announcements"
    proxy.clear()
    assert_right(make_machine(), ids, 1)
    assert len(make_machine().json("ls")) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_saving_gets_over_whatever_passes(machine, make_machine, proxy, seed):
    for number, fault in enumerate(faults.PASSING_FAULTS.values()):
        if fault is not faults.flip:
            proxy.add(fault, probability=0.04, seed=100 * seed + number)
    print(f"seed {seed}")
    ids = machine.train(3, SIZE, seed)
    machine.flush()
    proxy.clear()
    assert_right(make_machine(), ids, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_reading_gets_over_whatever_passes_and_never_shows_wrong_bytes(machine, make_machine, proxy, seed):
    ids = machine.train(3, SIZE, seed)
    machine.flush()
    for number, fault in enumerate(faults.PASSING_FAULTS.values()):
        proxy.add(fault, "GET HEAD LIST", probability=0.04, seed=100 * seed + number)
    print(f"seed {seed}")
    other = make_machine()
    for step, checkpoint in enumerate(ids[1:]):
        done = other.run("cat", checkpoint, "model.pt", text=False)
        if done.returncode == 0:
            assert done.stdout == model(seed, step, SIZE)
        else:
            assert done.stdout == b"" or model(seed, step, SIZE).startswith(done.stdout)
            assert "Traceback" not in done.stderr
    proxy.clear()
    assert_right(other, ids, seed)


def test_flipped_bits_are_never_shown(machine, make_machine, proxy):
    ids = machine.train(1, SIZE)
    machine.flush()
    rule = proxy.add(faults.flip, "GET")
    other = make_machine()
    done = other.run("cat", ids[1], "model.pt", text=False)
    assert rule.hits
    assert done.returncode != 0
    assert done.stdout == b""
    assert "Traceback" not in done.stderr
    proxy.clear()
    assert_right(other, ids, 1)


def test_a_listing_that_lags_loses_nothing(machine, make_machine, proxy):
    proxy.lag_listings(3)
    ids = machine.train(3, SIZE)
    machine.flush()
    for each in (machine, make_machine()):
        for identifier in ids:
            show = functools.partial(each.run, "show", identifier)
            wait_until(lambda show=show: show().returncode == 0, "the listing shows it")
        assert_right(each, ids, 1)


def test_phantom_absence_loses_nothing(machine, make_machine, proxy):
    ids = machine.train(1, SIZE)
    machine.flush()
    rule = proxy.add(faults.missing, "GET HEAD", r"/(packs|log|index)/", probability=0.3, seed=3)
    later = machine.train(2, SIZE, 2)
    machine.flush()
    assert rule.seen
    proxy.clear()
    other = make_machine()
    assert_right(other, ids, 1)
    assert_right(other, later, 2)
