"""Who works on which request: the promises hold for every order in which things happen."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from replicated.mount.engine.native.protocol import GETATTR, READ, RELEASE, Request
from replicated.mount.engine.native.requests import (
    MAX_IDLE,
    MAX_READING,
    MAX_STUCK_THREADS,
    MAX_THREADS,
    Requests,
    Step,
)


def request(unique, operation=GETATTR):
    return Request(operation, unique, 1, b"")


class Threads(RuleBasedStateMachine):
    """Threads that do as they are told, in any order."""

    def __init__(self):
        super().__init__()
        self.requests = Requests()
        self.waiting = 1
        #: Requests that a thread works on, and those that are queued.
        self.running = {}
        self.queued = {}
        #: Running, but answered by somebody else.
        self.given_up = set()
        self.next_unique = 1

    known = Bundle("known")

    @precondition(lambda self: self.waiting)
    @rule(target=known, operation=st.sampled_from([GETATTR, READ]))
    def take(self, operation):
        taken = request(self.next_unique, operation)
        self.next_unique += 1
        step = self.requests.take(taken)
        if step is Step.WAIT:
            self.queued[taken.unique] = taken
            assert self.busy >= MAX_THREADS - 1 or (operation == READ and self.reading >= MAX_READING)
        else:
            self.running[taken.unique] = taken
            self.waiting -= 1
            if step is Step.START_AND_WORK:
                self.waiting += 1
        return taken

    @rule(taken=known)
    def finish(self, taken):
        if taken.unique not in self.running:
            return
        del self.running[taken.unique]
        assert self.requests.claim(taken) == (taken.unique not in self.given_up)
        self.given_up.discard(taken.unique)
        following = self.requests.next()
        if isinstance(following, Request):
            self.start(following)
        elif following is Step.WAIT:
            self.waiting += 1
        else:
            assert following is Step.LEAVE
            assert self.waiting >= MAX_IDLE
        if not isinstance(following, Request):
            assert not [r for r in self.queued.values() if r.operation != READ]
            assert not self.queued or self.reading >= MAX_READING

    @rule(taken=consumes(known))
    def give_up(self, taken):
        waits = taken.unique in self.queued or (
            taken.unique in self.running and taken.unique not in self.given_up
        )
        assert self.requests.give_up(taken.unique) == waits
        assert not self.requests.give_up(taken.unique)
        if taken.unique in self.queued:
            del self.queued[taken.unique]
        elif waits:
            self.given_up.add(taken.unique)
        following = self.requests.next_for_another()
        if following is not None:
            self.start(following)
        # The thread that hangs comes back one day.
        if taken.unique in self.running and len(self.given_up) > 3:
            self.finish(taken)

    def start(self, queued):
        assert self.queued.pop(queued.unique) is queued
        self.running[queued.unique] = queued

    @property
    def busy(self):
        return len(self.running) - len(self.given_up)

    @property
    def reading(self):
        unanswered = [r for r in self.running.values() if r.unique not in self.given_up]
        return sum(r.operation == READ for r in unanswered)

    @invariant()
    def somebody_always_waits(self):
        assert self.waiting >= 1

    @invariant()
    def there_are_not_too_many(self):
        assert self.busy + self.waiting <= MAX_THREADS + MAX_IDLE
        assert len(self.running) + self.waiting <= MAX_STUCK_THREADS + MAX_IDLE
        assert self.reading <= MAX_READING
        assert self.waiting <= MAX_IDLE

    @invariant()
    def what_is_unanswered_is_known(self):
        unanswered = (self.running.keys() - self.given_up) | self.queued.keys()
        assert {r.unique for r in self.requests.overdue(-1)} == unanswered


TestThreads = Threads.TestCase
TestThreads.settings = settings(max_examples=60, stateful_step_count=120)


def test_reads_leave_threads_for_names():
    requests = Requests()
    steps = [requests.take(request(n, READ)) for n in range(MAX_READING + 5)]
    assert steps.count(Step.WAIT) == 5
    assert requests.take(request(100)) is not Step.WAIT


def test_a_queue_is_served_names_first_and_in_order():
    requests = Requests()
    for number in range(MAX_READING + 2):
        requests.take(request(number, READ))
    number = 100
    while requests.take(request(number)) is not Step.WAIT:
        number += 1
    requests.take(request(number + 1))
    assert requests.claim(request(0, READ))
    assert [requests.next().unique for _ in range(3)] == [number, number + 1, MAX_READING]


def test_what_was_given_up_in_the_queue_is_never_worked_on():
    requests = Requests()
    for number in range(MAX_READING + 2):
        requests.take(request(number, READ))
    assert requests.give_up(MAX_READING)
    assert requests.claim(request(0, READ))
    assert requests.next().unique == MAX_READING + 1


def test_threads_that_are_stuck_make_room_for_others():
    requests = Requests()
    for number in range(MAX_READING + 1):
        requests.take(request(number, READ))
    assert requests.next_for_another() is None
    assert requests.give_up(3)
    assert requests.next_for_another().unique == MAX_READING
    assert not requests.claim(request(3, READ))


@pytest.mark.parametrize("timeout_s, expected", [(-1, [7]), (1000, [])])
def test_what_waits_for_too_long_is_known(timeout_s, expected):
    requests = Requests()
    requests.take(request(7))
    assert [late.unique for late in requests.overdue(timeout_s)] == expected


def fill(requests):
    """Let all threads work but the one that waits."""
    number = 1000
    while requests.take(request(number)) is Step.START_AND_WORK:
        number += 1
    assert requests.give_up(number)


def test_a_handle_is_given_back_however_long_that_was_queued():
    requests = Requests()
    fill(requests)
    assert requests.take(request(7, RELEASE)) is Step.WAIT
    assert requests.take(request(8)) is Step.WAIT
    late = [overdue.unique for overdue in requests.overdue(-1)]
    assert 8 in late and 7 not in late
    assert requests.claim(request(1000))
    assert requests.next() == request(7, RELEASE)
    # From now on a thread works on it, which may be stuck like any other.
    assert 7 in [overdue.unique for overdue in requests.overdue(-1)]


@pytest.mark.parametrize("operation", [GETATTR, READ, RELEASE])
def test_what_is_put_back_comes_first(operation):
    requests = Requests()
    fill(requests)
    for number in (7, 8):
        assert requests.take(request(number, operation)) is Step.WAIT
    assert requests.give_up(1000)
    taken = requests.next_for_another()
    assert taken.unique == 7
    requests.put_back(taken)
    assert requests.next_for_another().unique == 7
    assert requests.next_for_another() is None


def test_what_is_put_back_when_nobody_waits_for_it_is_not_worked_on():
    requests = Requests()
    fill(requests)
    requests.take(request(7))
    assert requests.give_up(1000)
    taken = requests.next_for_another()
    assert requests.give_up(7)
    requests.put_back(taken)
    assert requests.next_for_another() is None


def test_somebody_is_to_wait_when_nobody_does():
    requests = Requests()
    assert not requests.needs_waiting()
    assert requests.take(request(7)) is Step.START_AND_WORK
    requests.leave()
    assert requests.needs_waiting()
    assert not requests.needs_waiting()
    assert requests.claim(request(7))
    assert requests.next() is Step.WAIT


def test_who_was_interrupted_is_known_until_the_answer():
    requests = Requests()
    assert requests.interrupt(7) is None
    for number in (7, 8):
        requests.take(request(number))
    assert requests.interrupt(7) == request(7)
    ((interrupted, since_s),) = requests.interrupted()
    assert interrupted == request(7) and since_s >= 0
    assert requests.claim(request(7))
    assert requests.interrupted() == []
