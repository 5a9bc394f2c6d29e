"""Forks: parent and child can both go on, whatever other threads of the parent are doing."""

import pytest

#: Forks while other threads of the parent are busy; every child and the parent make calls.
SCRIPT = """
import faulthandler, os, sys, threading
from replicate import connection, query
from replicate._pb import daemon_pb2 as pb

busy, forks = sys.argv[1], int(sys.argv[2])

def answer():
    return connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen

def work():
    if busy == "calls":
        answer()
    elif busy == "long calls":
        connection.call("WaitStored", pb.WaitStoredRequest(timeout_s=0.5), pb.StatusReply)
    elif busy == "streams":
        request = pb.ListExperimentsRequest(limit=200)
        for _ in connection.stream("ListExperiments", request, pb.ExperimentSummary):
            pass

def loop():
    while not stop.is_set():
        try:
            work()
        except Exception as error:
            if busy != "streams":  # a fork may end one that has begun, as documented
                print(repr(error))

# Long calls would be waited for.
if busy == "long calls":
    connection._FORK_PATIENCE_S = 0.05
answer()
stop = threading.Event()
threads = [threading.Thread(target=loop) for _ in range(3 if busy != "nothing" else 0)]
for thread in threads:
    thread.start()
for _ in range(forks):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(30, exit=True)
        answer()
        answer()
        os._exit(0)
    answer()
    status = os.waitpid(pid, 0)[1]
    if status:
        print("child ended with", status)
stop.set()
for thread in threads:
    thread.join()
print("done")
"""


@pytest.mark.parametrize("busy", ["nothing", "calls", "long calls", "streams"])
def test_children_and_parents_can_call_after_fifty_forks(server, run_script, busy):
    server()
    done = run_script(SCRIPT, busy, "50")
    assert (done.status, done.output, done.errors) == (0, "done\n", "")


def test_a_child_of_a_child_can_call(server, run_script):
    server()
    source = """
import os, sys
from replicate import connection
from replicate._pb import daemon_pb2 as pb
def answer():
    return connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen
answer()
for depth in range(4):
    if os.fork():
        answer()
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    answer()
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")


def test_a_pool_of_forked_workers_can_call(server, run_script):
    server()
    source = """
import multiprocessing
from replicate import connection
from replicate._pb import daemon_pb2 as pb
def answer(number):
    return connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen
answer(0)
with multiprocessing.get_context("fork").Pool(4) as pool:
    print(len(set(pool.map(answer, range(100)))))
answer(0)
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "100\n", "")


def test_a_child_can_call_when_grpc_was_imported_before(server, run_script):
    server()
    source = """
import grpc, os, sys
from replicate import connection
from replicate._pb import daemon_pb2 as pb
def answer():
    return connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen
answer()
for _ in range(5):
    if not os.fork():
        answer()
        os._exit(0)
    answer()
    if os.wait()[1]:
        sys.exit("a child failed")
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")


def test_a_fork_in_the_middle_of_a_stream_ends_it_in_both_processes(server, run_script):
    server()
    source = """
import os, sys
from replicate import connection, errors
from replicate._pb import daemon_pb2 as pb
connection._FORK_PATIENCE_S = 1000  # must not be waited for: the stream is this thread's own
stream = connection.stream("ListExperiments", pb.ListExperimentsRequest(limit=100000), pb.ExperimentSummary)
next(stream)
pid = os.fork()
try:
    while True:
        next(stream)
except errors.DaemonUnavailable as error:
    if "fork" not in error.message:
        sys.exit(error.message)
chosen = connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen
if pid:
    sys.exit(os.wait()[1])
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")


def test_a_child_may_drop_a_stream_of_its_parent(server, run_script):
    server()
    source = """
import gc, os, sys
from replicate import connection
from replicate._pb import daemon_pb2 as pb
stream = connection.stream("ListExperiments", pb.ListExperimentsRequest(limit=100000), pb.ExperimentSummary)
next(stream)
pid = os.fork()
if not pid:
    del stream
    gc.collect()
connection.call("Resolve", pb.Target(id="x"), pb.Resolution)
if pid:
    sys.exit(os.wait()[1])
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")


def test_calls_from_hooks_around_a_fork_work(server, run_script):
    server()
    source = """
import os, sys
def answer():
    return connection.call("Resolve", pb.Target(id="x"), pb.Resolution).chosen
# Registered first, so run last before a fork and first after it.
os.register_at_fork(before=lambda: answer(), after_in_parent=lambda: answer())
from replicate import connection
from replicate._pb import daemon_pb2 as pb
answer()
pid = os.fork()
answer()
if pid:
    sys.exit(os.wait()[1])
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
