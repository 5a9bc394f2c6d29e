"""How a training process ends, and what it leaves behind; run as real scripts."""

import os
import signal
import subprocess
import sys

import pytest

import replicate


def only_experiment():
    (found,) = replicate.experiments.list()
    return found


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", "stopped"),
        ("sys.exit(0)", "stopped"),
        ("raise ValueError('no')", "failed"),
        ("raise KeyboardInterrupt", "failed"),
        ("sys.exit(3)", "failed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "killed"),
    ],
)
def test_the_status_tells_how_the_process_ended(run_script, wait_until, end, status):
    source = f"""
import os, signal, sys
import replicate
experiment = replicate.init(quiet=True)
experiment.checkpoint(metrics={{"loss": 1}})
{end}
"""
    run_script(source)
    wait_until(lambda: only_experiment().status == status, f"the experiment is {status}")
    assert len(only_experiment().checkpoints) == 1


def test_everything_captured_is_stored_after_a_kill(run_script, project):
    source = """
import os, signal
import replicate
experiment = replicate.init(quiet=True)
with open("model.pt", "wb") as file:
    file.write(bytes(range(256)) * 40000)
experiment.checkpoint("model.pt")
with open("model.pt", "wb") as file:
    file.write(b"overwritten")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_script(source).status == -signal.SIGKILL
    with only_experiment().checkpoints[0].open("model.pt") as file:
        assert file.read() == bytes(range(256)) * 40000


def test_a_run_without_init_asks_nobody(run_script, home):
    assert run_script("import replicate; replicate.init").status == 0
    assert list(home.iterdir()) == []


def test_init_says_one_line_and_the_end_nothing_when_all_is_stored(run_script):
    source = """
import replicate
experiment = replicate.init(name="Line\\nbreak", params={"lr": 1})
experiment.checkpoint(metrics={"loss": 1})
replicate.flush()
print(experiment.short_id)
"""
    done = run_script(source)
    assert done.status == 0
    (line,) = done.errors.splitlines()
    assert line.startswith(f"replicate: experiment {done.output.strip()} (Line\\nbreak) in file://")


@pytest.mark.parametrize("stop", ["", "experiment.stop()"])
def test_the_end_says_what_is_still_being_stored(run_script, project, stop):
    source = f"""
import os
import replicate
experiment = replicate.init()
replicate.flush()
os.rename(".replicate", "moved")  # so that nothing can be stored
open(".replicate", "w").close()
with open("model.pt", "wb") as file:
    file.write(bytes(3 << 20))
experiment.checkpoint("model.pt")
experiment.checkpoint("model.pt", metrics={{"loss": 1}})
experiment.checkpoint(metrics={{"loss": 2}})
{stop}
"""
    done = run_script(source)
    assert done.status == 0
    last = done.errors.splitlines()[-1]
    # Whether the daemon has noticed by then that it cannot store them is open.
    assert last.startswith("replicate: still storing 2 snapshots (6.0 MiB) in the background")
    assert last.endswith("; `replicate status` shows progress")
    (project / ".replicate").unlink()
    (project / "moved").rename(project / ".replicate")
    replicate.flush()
    assert only_experiment().status == "stopped"
    assert [checkpoint.state for checkpoint in only_experiment().checkpoints] == ["stored"] * 3


@pytest.mark.parametrize("quiet", [False, True])
def test_why_nothing_can_be_stored_is_told_once_and_at_the_end(run_script, project, quiet):
    source = f"""
import os, time
import replicate
from replicate import query
experiment = replicate.init(quiet={quiet})
replicate.flush()
os.rename(".replicate", "moved")
open(".replicate", "w").close()
open("model.pt", "w").close()
experiment.checkpoint("model.pt")
while not query.status().waiting_because:
    time.sleep(0.01)
for _ in range(5):
    experiment.checkpoint("model.pt")
"""
    done = run_script(source)
    warning, end = done.errors.splitlines()[0 if quiet else 1 :]
    assert warning.startswith("replicate: what is captured waits to be stored: ")
    assert ".replicate" in warning
    assert end.startswith("replicate: still storing 6 snapshots (0 B) in the background, which waits at ")
    assert ".replicate" in end
    (project / ".replicate").unlink()
    (project / "moved").rename(project / ".replicate")
    replicate.flush()


BEGIN_AT_EXIT = """
def f():
    import replicate
    with_files = replicate.init(quiet=True)
    with_files.checkpoint(metrics={"a": 1})
    with_files.checkpoint(metrics={"a": 2})

atexit.register(f)
"""


@pytest.mark.parametrize(
    "source",
    [
        "import atexit, replicate\n" + BEGIN_AT_EXIT,
        "import atexit, threading\n" + BEGIN_AT_EXIT,
        "import atexit\n" + BEGIN_AT_EXIT + "import replicate\nreplicate.init(quiet=True).delete()\n",
        "import atexit, replicate\nreplicate.init(quiet=True).delete()\n" + BEGIN_AT_EXIT,
    ],
)
def test_an_experiment_that_begins_while_python_exits_is_stopped(run_script, wait_until, source):
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert only_experiment().checkpoints.step == [0, 1]
    wait_until(lambda: only_experiment().status == "stopped", "the experiment is stopped")


def test_a_forked_child_records_and_never_ends_the_experiment(run_script, wait_until):
    source = """
import os, sys
import replicate
with replicate.init(quiet=True) as experiment:
    experiment.checkpoint(metrics={"from": "parent"})
    for how in ("leave", "stop", "exit", "fail"):
        pid = os.fork()
        if pid == 0:
            checkpoint = experiment.checkpoint(metrics={"from": how})
            if checkpoint.state == "failed":
                os._exit(9)
            if how == "stop":
                experiment.stop()
            if how == "exit":
                sys.exit(0)
            if how == "fail":
                sys.stderr = None
                raise ValueError
            break
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) not in (0, 1):
            sys.exit("a child failed")
        if not experiment.is_running():
            sys.exit(f"a child that ends by {how} ended the experiment")
    else:
        experiment.refresh()
        print(sorted(c.metrics["from"] for c in experiment.checkpoints))
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert done.output == "['exit', 'fail', 'leave', 'parent', 'stop']\n"
    assert only_experiment().status == "stopped"


def test_forked_workers_of_a_busy_trainer_record_too(run_script):
    source = """
import multiprocessing, threading
import replicate

experiment = replicate.init(quiet=True)

def work(number):
    return experiment.checkpoint(metrics={"worker": number}).state

stop = threading.Event()
def train():
    while not stop.is_set():
        experiment.checkpoint(metrics={"worker": -1})
thread = threading.Thread(target=train)
thread.start()
for _ in range(5):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        states = pool.map(work, range(8))
        if "failed" in states:
            print(states)
stop.set()
thread.join()
experiment.refresh()
print(sum(c.metrics["worker"] >= 0 for c in experiment.checkpoints))
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "40\n", "")


def test_checkpoints_can_be_made_while_python_exits(run_script):
    source = """
import atexit
import replicate
atexit.register(lambda: experiment.checkpoint(metrics={"when": "late"}))
experiment = replicate.init(quiet=True)
atexit.register(lambda: experiment.checkpoint(metrics={"when": "early"}))
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert [c.metrics["when"] for c in only_experiment().checkpoints] == ["early", "late"]


def test_an_excepthook_of_the_user_is_called(run_script):
    source = """
import sys
import replicate
sys.excepthook = lambda kind, value, traceback: print("mine:", value)
replicate.init(quiet=True)
raise ValueError("no")
"""
    done = run_script(source)
    assert (done.output, done.errors) == ("mine: no\n", "")
    assert only_experiment().status == "failed"


def test_a_thread_that_fails_does_not_fail_the_experiment(run_script):
    source = """
import sys, threading
import replicate
threading.excepthook = lambda arguments: None
replicate.init(quiet=True)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
"""
    assert run_script(source).status == 0
    assert only_experiment().status == "stopped"


def test_a_process_whose_daemon_was_killed_ends_well(run_script):
    source = """
import os, signal
import replicate
from replicate import connection
replicate.init(quiet=True).checkpoint(metrics={"loss": 1})
os.kill(connection.probe().pid, signal.SIGKILL)
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert only_experiment().status == "stopped"


def test_a_process_whose_state_was_deleted_ends_well(run_script, home):
    source = """
import os, shutil
import replicate
from replicate import connection
replicate.init(quiet=True)
connection.stop_daemon()
shutil.rmtree(os.environ["REPLICATE_HOME"])
os.mkdir(os.environ["REPLICATE_HOME"])
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert list(home.iterdir()) == []


def test_two_trainers_record_into_one_repository_at_once(home, project):
    source = """
import replicate
with replicate.init(".", quiet=True) as experiment:
    for _ in range(10):
        experiment.checkpoint("script.py")
"""
    (project / "script.py").write_text(source)
    trainers = [subprocess.Popen([sys.executable, "script.py"], cwd=project) for _ in range(2)]
    assert [trainer.wait(60) for trainer in trainers] == [0, 0]
    replicate.flush(60)
    found = replicate.experiments.list()
    assert [experiment.status for experiment in found] == ["stopped", "stopped"]
    assert [experiment.checkpoints.step for experiment in found] == [list(range(10))] * 2


def test_nothing_is_recorded_when_it_is_disabled(run_script, home, project):
    source = """
import replicate
with replicate.init("missing", {"lr": 1, "model": object()}, name="x", tags=["t"]) as experiment:
    checkpoint = experiment.checkpoint("missing", {"loss": 1}, primary_metric=("loss", "minimize"))
    assert experiment.checkpoint(step=5).step == 5 and experiment.checkpoint().step == 6
    assert experiment.best() is checkpoint and experiment.best().metrics == {"loss": 1}
    assert experiment.is_running() and experiment.params["lr"] == 1
    assert checkpoint.wait() is checkpoint
    experiment.refresh()
    for read in (checkpoint.open, experiment.mount, experiment.checkout, lambda _: checkpoint.files()):
        try:
            read("x")
        except replicate.errors.NotStored as error:
            print(error.message)
    experiment.checkpoints.delete()
    experiment.delete()
assert experiment.status == "stopped"
replicate.flush()
odd = replicate.init(tags=5, name=5, params=5, ignore=5, resume=5)
for primary in (("a",), 5, "ab", ("a", "up"), {"a": "b"}):
    assert odd.checkpoint(5, 5, 2**63, primary_metric=primary).step >= 0
assert odd.tags == () and odd.name == ""
for filter in (None, "loss < 1", bool):
    assert replicate.experiments.list(filter) == []
try:
    replicate.experiments.get("latest")
except replicate.errors.NotStored as error:
    print(error.message)
"""
    done = run_script(source, environment={"REPLICATE_DISABLED": "1"})
    assert (done.status, done.errors) == (0, "")
    assert done.output == "nothing was recorded, because REPLICATE_DISABLED is set\n" * 5
    assert list(home.iterdir()) == []
    assert os.listdir(project) == ["script.py"]


def test_checkpoints_can_be_made_in_a_signal_handler_at_any_moment(run_script):
    source = """
import signal
import replicate

experiment = replicate.init(quiet=True)
count = 0

def handler(number, frame):
    global count
    count += 1
    experiment.checkpoint(metrics={"by": "handler"})

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.007)
made = 0
while count < 30:
    experiment.checkpoint(metrics={"by": "main"})
    made += 1
signal.setitimer(signal.ITIMER_REAL, 0)
experiment.refresh()
print(sorted(experiment.checkpoints.step) == list(range(made + count)))
print({checkpoint.state for checkpoint in experiment.checkpoints} <= {"stored", "captured"})
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "True\nTrue\n", "")


def test_a_path_that_may_not_be_read_is_a_permission_error(run_script):
    source = """
import ctypes, errno, os
import replicate
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP, for the daemon that will be started
open("secret", "w").close()
os.chmod("secret", 0)
try:
    replicate.init("secret")
except PermissionError as error:
    print(error.errno == errno.EACCES, os.path.basename(error.filename))
print(len(replicate.experiments.list()))
with replicate.init(quiet=True) as experiment:
    print(experiment.checkpoint("secret").state)
"""
    done = run_script(source)
    assert done.status == 0, done.errors
    assert done.output.split() == ["True", "secret", "0", "failed"]
