import threading

import pytest

from replicated.mount.engine import bounded_calls as module
from replicated.mount.engine.bounded_calls import BoundedCalls, GivenUp

DEADLINE_S = 30


def keep(result):
    return result


@pytest.fixture
def calls():
    return BoundedCalls(DEADLINE_S, lambda: False)


def test_the_result_is_what_is_made_of_it(calls):
    assert calls.run(lambda: 20, lambda result: result + 1) == 21


def test_none_is_a_result(calls):
    assert calls.run(lambda: None, keep) is None


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(0)])
def test_what_the_function_raises_is_raised(calls, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        calls.run(fail, keep)
    assert raised.value is error
    assert calls.run(lambda: 1, keep) == 1


def test_calls_one_after_the_other_take_the_same_thread(calls):
    first, second = (calls.run(threading.get_ident, keep) for _ in range(2))
    assert first == second != threading.get_ident()


def test_the_thread_that_made_a_result_waits_until_it_was_used(calls):
    def use(maker):
        # Another call meanwhile has to be made by another thread.
        return maker != calls.run(threading.get_ident, keep)

    assert calls.run(threading.get_ident, use)


def test_whoever_waits_too_long_is_told(caplog):
    hanging = threading.Event()
    calls = BoundedCalls(0.05, lambda: False)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        calls.run(hanging.wait, keep)
    hanging.set()


def test_an_answer_that_is_not_wanted_any_more_is_not_waited_for():
    hanging = threading.Event()
    calls = BoundedCalls(DEADLINE_S, lambda: True)
    with pytest.raises(GivenUp):
        calls.run(hanging.wait, keep)
    hanging.set()


def test_a_result_that_comes_too_late_is_discarded():
    hanging, discarded = threading.Event(), threading.Event()
    calls = BoundedCalls(0.05, lambda: False)

    def answer():
        hanging.wait()
        return "late"

    with pytest.raises(TimeoutError):
        calls.run(answer, keep, discard=lambda result: result == "late" and discarded.set())
    assert not discarded.is_set()
    hanging.set()
    assert discarded.wait(DEADLINE_S)


def test_calls_that_hang_take_all_places_and_give_them_back(monkeypatch):
    monkeypatch.setattr(module, "_MAX_WORKERS", 2)
    hanging = threading.Event()
    given_up = [False]
    calls = BoundedCalls(0.05, lambda: given_up[0])
    for _ in range(3):
        # The third finds no place.
        with pytest.raises(TimeoutError):
            calls.run(hanging.wait, keep)
    hanging.set()
    patient = threading.Event()

    def run():
        while not patient.is_set():
            try:
                calls.run(patient.set, keep)
            except TimeoutError:
                continue

    thread = threading.Thread(target=run)
    thread.start()
    assert patient.wait(DEADLINE_S)
    thread.join()


def test_a_thread_that_cannot_be_had_keeps_no_place(monkeypatch):
    monkeypatch.setattr(module, "_MAX_WORKERS", 2)
    calls = BoundedCalls(DEADLINE_S, lambda: False)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                calls.run(lambda: 1, keep)
    # Both places are there, at the same time.
    assert calls.run(lambda: 1, lambda one: calls.run(lambda: one + 1, keep)) == 2


def test_many_callers_get_their_own_results(calls):
    wrong = []

    def call(number):
        wrong.extend(at for at in range(200) if calls.run(lambda: (number, at), keep) != (number, at))  # noqa: B023

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
