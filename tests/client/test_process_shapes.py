"""Every shape that a training process can have, and a daemon that is replaced in the middle of it."""

import pytest

import replicate


def only_experiment():
    (found,) = replicate.experiments.list()
    return found


def stored_contents(experiment):
    """Step → what was saved at it."""
    contents = {}
    for checkpoint in experiment.checkpoints:
        with checkpoint.wait(60).open(checkpoint.path) as file:
            contents[checkpoint.step] = file.read()
    return contents


#: Trains for a while and says what should be found; `disturb` is called by the way or by another thread.
TRAINING = """
import os, signal, subprocess, sys, threading
import replicate
from replicate import connection

def kill():
    daemon = connection.probe()
    if daemon is not None:
        os.kill(daemon.pid, signal.SIGKILL)

def control(word):
    command = [sys.executable, "-m", "replicate.cli", "daemon", word]
    subprocess.run(command, check=True, capture_output=True)

def stop():
    control("stop")

def restart():
    control("stop")
    control("start")

disturb = {"kill": kill, "stop": stop, "restart": restart}[sys.argv[1]]
experiment = replicate.init(quiet=True)

def save(step):
    # Until it is stored, a large file is kept by a lease, which does not outlive a daemon that is killed.
    path = f"model-{step}.pt" if sys.argv[1] == "kill" else "model.pt"
    with open(path, "wb") as file:
        file.write(b"%d " % step * 700_000)
    if experiment.checkpoint(path, {"loss": step}).state == "failed":
        print("failed:", step)
"""


@pytest.mark.parametrize("how", ["kill", "stop", "restart"])
def test_the_daemon_may_be_replaced_between_calls(run_script, how):
    source = TRAINING + "for step in range(4):\n    save(step)\n    disturb()\n"
    done = run_script(source, how)
    assert (done.status, done.output, done.errors) == (0, "", "")
    assert stored_contents(only_experiment()) == {step: b"%d " % step * 700_000 for step in range(4)}


#: Calls go on until the daemon was disturbed several times in the midst of them.
DISTURBED = """
made = threading.Semaphore(0)

def keep_disturbing():
    for _ in range(4):
        for _ in range(20):
            made.acquire()
        disturb()

thread = threading.Thread(target=keep_disturbing, daemon=True)
thread.start()
step = 0
while thread.is_alive():
    save(step)
    experiment.checkpoint(metrics={"loss": step})
    made.release()
    step += 1
experiment.refresh()
print(len(experiment.checkpoints) == 2 * step, "failed" in {c.state for c in experiment.checkpoints})
"""


@pytest.mark.parametrize("how", ["kill", "stop", "restart"])
def test_the_daemon_may_be_replaced_during_calls(run_script, how):
    done = run_script(TRAINING + DISTURBED, how)
    assert (done.status, done.output, done.errors) == (0, "True False\n", "")
    assert only_experiment().status == "stopped"


@pytest.mark.parametrize(
    "end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGTERM)", "signal.raise_signal(signal.SIGKILL)"]
)
def test_a_process_may_end_the_instant_a_checkpoint_returns(run_script, project, end):
    source = f"""
import os, signal
import replicate
experiment = replicate.init(quiet=True)
with open("model.pt", "wb") as file:
    file.write(b"weights" * 500_000)
experiment.checkpoint("model.pt")
{end}
"""
    run_script(source)
    (project / "model.pt").write_bytes(b"overwritten")
    assert stored_contents(only_experiment()) == {0: b"weights" * 500_000}


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("is_killed", [False, True])
def test_workers_of_every_kind_record(run_script, how, is_killed):
    source = f"""
import multiprocessing, os, signal
import replicate
from replicate import connection

def work(experiment, number):
    print(experiment.checkpoint(metrics={{"worker": number}}).state in ("captured", "stored"), flush=True)

if __name__ == "__main__":
    experiment = replicate.init(quiet=True)
    if {is_killed}:
        os.kill(connection.probe().pid, signal.SIGKILL)
    context = multiprocessing.get_context("{how}")
    for number in range(3):
        worker = context.Process(target=work, args=(experiment, number))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    assert experiment.is_running()
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "True\n" * 3, "")
    assert only_experiment().status == "stopped"
    assert only_experiment().checkpoints.metrics["worker"] == [0, 1, 2]


def test_a_child_forked_before_init_records_into_the_same_experiment(run_script):
    source = """
import os, sys
read, write = os.pipe()
pid = os.fork()
import replicate
if pid == 0:
    experiment = replicate.experiments.get(os.read(read, 64).decode())
    os._exit(0 if experiment.checkpoint().state in ("captured", "stored") else 1)
with replicate.init(quiet=True) as experiment:
    experiment.checkpoint()
    os.write(write, experiment.id.encode())
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert only_experiment().checkpoints.step == [0, 1]


def test_cells_of_a_kernel_that_runs_them_in_a_thread_record(run_script):
    source = """
import asyncio
cells = [
    "import replicate; experiment = replicate.init(quiet=True)",
    "for step in range(3): experiment.checkpoint(metrics={'loss': step})",
    "1 / 0",
    "experiment.checkpoint(metrics={'loss': 3}); print(experiment.stall_seconds > 0)",
]
async def kernel():
    names = {"__name__": "__main__"}
    for cell in cells:
        try:
            await asyncio.to_thread(exec, cell, names)
        except ZeroDivisionError as error:
            print(error)
asyncio.run(kernel())
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "division by zero\nTrue\n", "")
    assert only_experiment().status == "stopped"
    assert only_experiment().checkpoints.metrics["loss"] == [0, 1, 2, 3]


def test_a_handler_records_while_another_call_waits_for_the_daemon(run_script):
    source = """
import os, signal, threading
import replicate
from replicate import connection, launch
from replicate.home import find_home

experiment = replicate.init(quiet=True)
made = []

def handler(number, frame):
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill(daemon, signal.SIGCONT)
    made.append(experiment.checkpoint(metrics={"by": "handler"}))

daemon = connection.probe().pid
signal.signal(signal.SIGALRM, handler)
for _ in range(3):
    os.kill(daemon, signal.SIGSTOP)
    while not launch.describe_silence(find_home())[0]:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    made.append(experiment.checkpoint(metrics={"by": "main"}))
print([one.state for one in made].count("failed"), sorted(one.step for one in made))
"""
    done = run_script(source)
    assert (done.status, done.output, done.errors) == (0, "0 [0, 1, 2, 3, 4, 5]\n", "")
    replicate.flush(60)
    assert sorted(only_experiment().checkpoints.step) == [0, 1, 2, 3, 4, 5]


def test_a_scheduler_that_ends_a_job_with_a_handler_gets_its_checkpoint(run_script):
    source = """
import os, signal, sys
import replicate

experiment = replicate.init(quiet=True)

def handler(number, frame):
    with open("model.pt", "wb") as file:
        file.write(b"last words")
    experiment.checkpoint("model.pt")
    sys.exit(0)

signal.signal(signal.SIGTERM, handler)
while True:
    experiment.checkpoint(metrics={"loss": 1})
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = run_script(source)
    assert (done.status, done.errors) == (0, "")
    assert only_experiment().status == "stopped"
    with only_experiment().checkpoints[-1].wait(60).open("model.pt") as file:
        assert file.read() == b"last words"
