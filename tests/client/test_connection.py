"""Calls: replies, errors, repetition, versions; against a server that does as it is told, and the daemon."""

import itertools
import os
import signal
import threading

import pytest

from replicate import connection, errors, query, wire
from replicate._pb import daemon_pb2 as pb
from replicate.errors import DaemonIncompatible, DaemonUnavailable, InternalError, InvalidArgument


def resolve(action):
    """Ask a server to do something; how many times it was asked."""
    return int(connection.call("Resolve", pb.Target(id=action), pb.Resolution).chosen)


@pytest.fixture
def quickly(monkeypatch):
    """Repeat without waiting."""
    monkeypatch.setattr(connection, "_RETRY_DELAYS_S", (0.0,) * 5)


def test_a_call_gives_the_reply(server):
    server()
    assert resolve("answer") == 1
    assert resolve("answer") == 2


def test_a_stream_gives_the_replies_in_order(server):
    server()
    request = pb.ListExperimentsRequest(limit=1000)
    replies = connection.stream("ListExperiments", request, pb.ExperimentSummary)
    assert [reply.status for reply in replies] == [str(number) for number in range(1000)]


def test_a_stream_can_be_left_early(server):
    server()
    for _ in range(20):
        request = pb.ListExperimentsRequest(limit=100_000)
        replies = connection.stream("ListExperiments", request, pb.ExperimentSummary)
        assert [reply.status for reply in itertools.islice(replies, 2)] == ["0", "1"]
        replies.close()
    assert resolve("answer") == 1


@pytest.mark.parametrize("kind", [errors.NotFound, errors.RepositoryUnreachable, errors.CheckoutConflict])
def test_errors_arrive_as_they_were_raised(server, kind):
    server()
    with pytest.raises(kind) as caught:
        resolve(f"raise:{kind.code}")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("what happened", "what to do")
    assert caught.value.fields == {"field": "value"}
    # grpc's own error says nothing more, and would fill a screen.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_error_of_the_daemon_is_not_repeated(server):
    server()
    with pytest.raises(errors.RepositoryUnreachable):
        resolve("raise:repository_unreachable")
    assert resolve("answer") == 2


def test_a_bug_is_told_as_such_with_the_log(server, home):
    server()
    with pytest.raises(InternalError, match="a bug") as caught:
        resolve("bug")
    assert str(home / "logs" / "replicated.log") in caught.value.hint


def test_a_call_is_repeated_while_the_daemon_is_unavailable(server, quickly):
    server()
    assert resolve("unavailable:3") == 4


def test_a_call_is_not_repeated_for_ever(server, quickly):
    server()
    with pytest.raises(DaemonUnavailable, match="lost: not now"):
        resolve("unavailable:100")
    assert resolve("answer") == 7


def test_a_call_that_takes_too_long_is_given_up(server):
    server()
    with pytest.raises(DaemonUnavailable, match="does not answer in time: WaitStored"):
        connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=5), pb.StatusReply, timeout_s=0.1)


def test_a_method_that_the_daemon_does_not_know_means_another_version(server):
    server()
    with pytest.raises(DaemonIncompatible) as caught:
        connection.call("Remove", pb.RemoveRequest(), pb.RemoveReply)
    assert "replicate daemon stop" in caught.value.hint


def test_a_request_that_is_too_large_is_refused(server):
    server()
    with pytest.raises(InvalidArgument, match="too large for one message"):
        connection.call("Resolve", pb.Target(id="x" * (5 << 20)), pb.Resolution)


def test_another_version_of_the_protocol_is_refused_and_can_be_stopped(server):
    process = server(protocol=99)
    with pytest.raises(DaemonIncompatible, match=r"version 9\.9 with protocol 99") as caught:
        resolve("answer")
    assert "replicate daemon stop" in caught.value.hint
    assert connection.probe().protocol == 99
    assert connection.stop_daemon()
    process.wait()
    assert connection.start_daemon().protocol == wire.PROTOCOL_VERSION


def test_a_killed_daemon_is_started_again_by_the_next_call(home):
    first = query.status().daemon.pid
    os.kill(first, signal.SIGKILL)
    second = query.status().daemon.pid
    assert second != first


def test_a_daemon_that_is_killed_during_calls_is_not_noticed(home, wait_until):
    pids, failures, stop = set(), [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                pids.add(query.status().daemon.pid)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for count in range(1, 4):
        wait_until(lambda count=count: len(pids) >= count or failures, "a daemon answers")
        os.kill(connection.start_daemon().pid, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_change_of_home_is_a_change_of_daemon(home, monkeypatch, tmp_path_factory):
    first = query.status().daemon.pid
    monkeypatch.setenv("REPLICATE_HOME", str(home / "other"))
    second = query.status().daemon.pid
    assert second != first
    connection.stop_daemon()
    monkeypatch.setenv("REPLICATE_HOME", str(home))
    assert query.status().daemon.pid == first


def test_ctrl_c_ends_a_call(home, server, run_script):
    server()
    source = """
import os, signal, threading
from replicate import connection
from replicate._pb import daemon_pb2 as pb
connection.start_daemon()
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=1000), pb.StatusReply)
except KeyboardInterrupt:
    print(connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen)
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "1\n", "")


def test_leaving_python_after_calls_is_silent(home, run_script):
    source = """
import threading
from replicate import query
threading.Thread(target=query.status).start()
query.status()
left = query.list_experiments("file:///nowhere")
try:
    next(left)
except LookupError:
    pass
except Exception as error:
    print(type(error).__name__)
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "RepositoryMissing\n", "")


def test_waiting_asks_again_until_the_time_is_up(server):
    server()
    seen = []
    with pytest.raises(TimeoutError, match=r"after 0\.2 s"):
        query.wait_stored((), 0.2, seen.append)
    assert all(status.pending == 1 for status in seen)
    assert len(seen) >= 2
