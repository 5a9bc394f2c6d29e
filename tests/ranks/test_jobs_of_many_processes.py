"""Distributed jobs: processes with homes of their own, told by their environment which rank they are."""

import os
import signal

import pytest

# Up to six interpreters start in a test, and three daemons.
pytestmark = pytest.mark.timeout(300)

#: Each rank saves a file of its own and one that is the same everywhere.
TRAIN = """
import os, sys, replicate
rank = os.environ["RANK"]
os.makedirs("model", exist_ok=True)
with open(f"model/shard-{rank}.bin", "wb") as file:
    file.write(rank.encode() * 50_000)
with open("model/config.json", "w") as file:
    file.write("{}")
experiment = replicate.init(params={"rank": rank}, quiet=True)
checkpoint = experiment.checkpoint("model", {"loss": 0.5, "rank": rank}, step=1, quiet=True)
print(experiment.id, checkpoint.id, checkpoint.state)
"""
FILES = {"model", "model/config.json"}
#: Goes on when it is told to, by a line on its standard input.
STEP = "\nsys.stdin.readline()\n"


def shards(*ranks):
    return FILES | {f"model/shard-{rank}.bin" for rank in ranks}


def test_the_files_of_all_ranks_are_one_checkpoint(any_job):
    ranks = any_job.make(3)
    for rank in ranks:
        rank.start(TRAIN)
    done = [rank.end() for rank in ranks]
    assert [one.status for one in done] == [0] * 3
    # Others may say that they were there before the repository was.
    assert done[0].errors == ""
    assert len({one.output for one in done}) == 1
    (checkpoint,) = ranks[0].stored(any_job.id)
    assert checkpoint["metrics"] == {"loss": 0.5, "rank": "0"}
    assert (checkpoint["step"], checkpoint["world_size"], checkpoint["path"]) == (1, 3, "model")
    for rank in ranks:
        assert rank.stored(any_job.id) == [checkpoint]
        assert rank.files(checkpoint["id"]) == shards(0, 1, 2)
        assert rank.cli("cat", checkpoint["id"], "model/shard-2.bin").output == "2" * 50_000
        status = rank.json("status")
        assert (status["queue"]["pending"], status["spool_bytes"], status["failures"]) == (0, 0, [])
    summary = ranks[1].json("show", any_job.id)
    assert (summary["params"], summary["status"]) == ({"rank": "0"}, "stopped")


def test_nothing_is_shown_before_the_last_rank_has_stored_its_part(any_job, wait_until):
    ranks = any_job.make(3)
    for rank in ranks[:2]:
        rank.run(TRAIN)
    ranks[2].start(TRAIN.replace("experiment.checkpoint", "sys.stdin.readline(); experiment.checkpoint"))

    def waits():
        return [part["waits_for"] for part in ranks[0].json("status")["waiting_parts"]]

    wait_until(
        lambda: any("waits for rank 2 of 3 since" in text for text in waits()), "it says who is missing"
    )
    (checkpoint,) = ranks[0].checkpoints(any_job.id)
    assert (checkpoint["state"], "rank 2 of 3" in checkpoint["waits_for"]) == ("captured", True)
    assert "waits for rank 2 of 3" in ranks[0].cli("show", checkpoint["id"]).output
    assert "waits for rank 2 of 3" in ranks[1].cli("status").output
    late = ranks[0].cli("flush", "--timeout", "0.5")
    assert late.status == 1 and "waits for rank 2 of 3" in late.errors
    # What is stored needs no room any more, and holds nothing up.
    assert ranks[0].json("status")["spool_bytes"] == 0
    outside = any_job.make(1)[0]
    assert outside.checkpoints(any_job.id) == []
    assert outside.cli("files", checkpoint["id"]).status == 1
    ranks[2].process.communicate("\n", timeout=60)
    assert [one["id"] for one in ranks[0].stored(any_job.id)] == [checkpoint["id"]]
    assert outside.files(checkpoint["id"]) == shards(0, 1, 2)


def test_other_ranks_may_be_first(any_job):
    ranks = any_job.make(2)
    ranks[1].run(TRAIN)
    ranks[0].run(TRAIN)
    (checkpoint,) = ranks[1].stored(any_job.id)
    assert ranks[1].files(checkpoint["id"]) == shards(0, 1)


def test_a_part_that_waits_holds_up_nothing_and_outlives_its_daemon(any_job, wait_until):
    ranks = any_job.make(2)
    # Said, because on a busy machine rank 1 may come later than a minute after it.
    told = TRAIN.replace("step=1, ", "step=1, rank=0, world_size=2, ")
    ranks[0].run(told + 'experiment.checkpoint(metrics={"loss": 0.25}, step=2)\n')
    (later,) = ranks[0].stored(any_job.id)
    assert later["step"] == 2
    ranks[0].kill_daemon()
    wait_until(lambda: ranks[0].json("status")["waiting_parts"], "the next daemon knows of it")
    ranks[1].run(TRAIN)
    found = ranks[0].stored(any_job.id, 2)
    assert [one["step"] for one in found] == [1, 2]
    assert ranks[0].files(found[0]["id"]) == shards(0, 1)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_ends_without_its_files_is_named(any_job, how, wait_until):
    ranks = any_job.make(3)
    ranks[2].start(
        "import sys, replicate\nexperiment = replicate.init(quiet=True)\nprint('up', flush=True)" + STEP
    )
    assert ranks[2].process.stdout.readline() == "up\n"
    for rank in ranks[:2]:
        rank.run(TRAIN)
    if how == "killed":
        ranks[2].process.send_signal(signal.SIGKILL)
        ranks[2].process.wait()
    else:
        ranks[2].process.communicate("\n", timeout=60)
    word = "was killed" if how == "killed" else "ended"

    def failed():
        return [one for one in ranks[0].checkpoints(any_job.id) if one["state"] == "failed"]

    (checkpoint,) = wait_until(failed, "it is given up")
    assert checkpoint["error"] == f"rank 2 {word} without adding its files"
    assert checkpoint["metrics"]["loss"] == 0.5
    # The experiment is rank 0's, and ended well.
    assert ranks[0].json("show", any_job.id)["status"] == "stopped"
    (failure,) = wait_until(lambda: ranks[1].json("status")["failures"], "rank 1 knows")
    assert "rank 2" in failure["error"] and failure["id"] == checkpoint["id"]
    assert ranks[1].cli("files", checkpoint["id"]).status == 1


def test_a_rank_that_never_comes_is_named_after_a_while(any_job, wait_until):
    ranks = any_job.make(3, REPLICATE_RANK_TIMEOUT="2")
    for rank in ranks[:2]:
        rank.run(TRAIN)

    def failed():
        return [one for one in ranks[0].checkpoints(any_job.id) if one["state"] == "failed"]

    (checkpoint,) = wait_until(failed, "it is given up")
    assert checkpoint["error"] == "the files of rank 2 of 3 did not come within 2 s"
    ranks[2].run(TRAIN)
    wait_until(lambda: ranks[2].json("status")["failures"], "it is too late")
    assert ranks[2].cli("files", checkpoint["id"]).status == 1


def test_what_a_rank_captured_before_it_died_is_in_the_checkpoint(any_job):
    ranks = any_job.make(2)
    ranks[1].start(TRAIN + "\nsys.stdout.flush()" + STEP)
    assert ranks[1].process.stdout.readline().endswith("captured\n")
    ranks[1].process.send_signal(signal.SIGKILL)
    ranks[1].process.wait()
    (ranks[1].directory / "model" / "shard-1.bin").write_bytes(b"changed")
    ranks[0].run(TRAIN)
    (checkpoint,) = ranks[0].stored(any_job.id)
    assert ranks[0].files(checkpoint["id"]) == shards(0, 1)
    assert ranks[0].cli("cat", checkpoint["id"], "model/shard-1.bin").output == "1" * 50_000
    assert ranks[0].json("show", any_job.id)["status"] == "stopped"


def test_different_files_under_one_path_are_a_conflict(any_job, wait_until):
    ranks = any_job.make(2)
    for rank in ranks:
        rank.run(TRAIN.replace('"{}"', "rank"))

    def failed():
        return [one for one in ranks[0].checkpoints(any_job.id) if one["state"] == "failed"]

    (checkpoint,) = wait_until(failed, "it is a conflict")
    assert checkpoint["error"] == "ranks 0 and 1 have saved different contents as model/config.json"
    for rank in ranks:
        wait_until(lambda rank=rank: rank.json("status")["failures"], "every rank is told")
        assert rank.cli("files", checkpoint["id"]).status == 1


def test_a_job_that_is_started_again_goes_on(any_job):
    ranks = any_job.make(2)
    script = TRAIN.replace("step=1, ", "") + "\ncheckpoint.wait(60)\n"
    for _ in range(2):
        for rank in ranks:
            rank.start(script)
        assert [rank.end().status for rank in ranks] == [0, 0]
    found = ranks[0].stored(any_job.id, 2)
    assert [one["step"] for one in found] == [0, 1]
    for checkpoint in found:
        assert ranks[0].files(checkpoint["id"]) == shards(0, 1)


def test_parts_of_two_starts_are_never_mixed(any_job):
    ranks = any_job.make(2)
    ranks[1].run(TRAIN, REPLICATE_ATTEMPT="first")
    for rank in ranks:
        rank.start(TRAIN.replace("* 50_000", "* 60_000"), REPLICATE_ATTEMPT="second")
    assert [rank.end().status for rank in ranks] == [0, 0]
    (checkpoint,) = ranks[0].stored(any_job.id)
    assert len(ranks[0].cli("cat", checkpoint["id"], "model/shard-1.bin").output) == 60_000
    (waiting,) = ranks[1].json("status")["waiting_parts"]
    assert waiting["id"] != checkpoint["id"] and "rank 0 of 2" in waiting["waits_for"]


def test_a_part_of_this_start_takes_the_place_of_one_of_an_earlier_start(any_job):
    """Where nothing tells the starts apart."""
    ranks = any_job.make(2)
    ranks[1].run(TRAIN)
    ranks[1].cli("flush", "--timeout", "3")
    ranks[1].run(TRAIN.replace("* 50_000", "* 60_000"))
    ranks[1].cli("flush", "--timeout", "3")
    ranks[0].run(TRAIN)
    # The second start of rank 1 has counted what the first left behind.
    found = ranks[0].stored(any_job.id)
    assert ranks[0].files(found[0]["id"]) == shards(0, 1)


def test_the_ranks_of_one_machine_share_a_daemon(any_job):
    ranks = any_job.make(3)
    home = ranks[0].environment["REPLICATE_HOME"]
    for rank in ranks:
        rank.start(TRAIN, REPLICATE_HOME=home)
    assert [rank.end().status for rank in ranks] == [0, 0, 0]
    (checkpoint,) = ranks[0].stored(any_job.id)
    assert ranks[0].files(checkpoint["id"]) == shards(0, 1, 2)
    assert checkpoint["metrics"]["rank"] == "0"


def test_rank_and_world_size_can_be_handed_in(job):
    ranks = job.make(2, RANK=None, WORLD_SIZE=None)
    script = TRAIN.replace("quiet=True)\nprint", "quiet=True, rank=int(rank), world_size=2)\nprint")
    script = script.replace('os.environ["RANK"]', 'os.environ["NUMBER"]').replace(
        'params={"rank": rank}, ', ""
    )
    first, second = ranks
    first.run(script, NUMBER="0")
    (waiting,) = first.checkpoints(job.id)
    assert waiting["state"] == "captured"
    second.run(script, NUMBER="1")
    (checkpoint,) = first.stored(job.id)
    assert first.files(checkpoint["id"]) == shards(0, 1)


def test_an_experiment_is_found_by_what_the_launcher_says(job):
    named = {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    ranks = job.make(2, REPLICATE_EXPERIMENT_ID=None, **named)
    outputs = {rank.run(TRAIN) for rank in ranks}
    assert len(outputs) == 1
    experiment, checkpoint, _ = outputs.pop().split()
    assert ranks[0].stored(experiment)[0]["id"] == checkpoint
    again = ranks[0].start(TRAIN)
    output, errors = again.communicate(timeout=60)
    assert output.split()[0] != experiment
    assert "an earlier job has recorded experiment" in errors


def test_a_rank_that_cannot_find_its_experiment_is_told_what_to_set(job):
    (_, second) = job.make(2, REPLICATE_EXPERIMENT_ID=None)
    second.start(TRAIN)
    done = second.end()
    assert done.status == 1
    assert "ValueError: this is rank 1 of 2, and nothing says which experiment it belongs to" in done.errors


ALONE = TRAIN.replace("quiet=True)\nprint", "quiet=True)\ncheckpoint.wait(80)\nprint")


def test_rank_0_alone_does_not_wait_for_others(any_job):
    first = any_job.make(4, REPLICATE_EXPERIMENT_ID=None)[0]
    experiment, checkpoint, state = first.run(ALONE).split()
    assert state == "stored"
    (found,) = first.stored(experiment)
    assert (found["id"], found["world_size"]) == (checkpoint, 1)
    assert first.files(checkpoint) == shards(0)


def test_rank_0_saves_alone_among_ranks_that_add_nothing(any_job):
    first, second = any_job.make(2)
    second.start(
        "import sys, replicate\nexperiment = replicate.init()\nexperiment.checkpoint(metrics={'a': 1})" + STEP
    )
    done = first.run(ALONE + 'experiment.checkpoint("model", step=2).wait(10)\n')
    assert done.split()[2] == "stored"
    _, errors = second.process.communicate("\n", timeout=60)
    assert "the metrics of a checkpoint are those that rank 0 gives" in errors
    assert [one["world_size"] for one in first.stored(any_job.id, 2)] == [1, 1]


def test_ranks_that_ended_well_leave_the_checkpoint_to_rank_0(job):
    first, second = job.make(2)
    second.run("import replicate\nwith replicate.init(quiet=True) as experiment: experiment.checkpoint()")
    # Sooner than rank 0 would give up to wait for others that may come.
    first.run(ALONE.replace("wait(80)", "wait(50)"))
    (checkpoint,) = first.stored(job.id)
    assert checkpoint["world_size"] == 1


def test_a_call_can_say_that_it_stands_alone(any_job):
    first = any_job.make(4)[0]
    first.run(TRAIN.replace("step=1, ", "step=1, world_size=1, ") + "\ncheckpoint.wait(30)\n")
    (checkpoint,) = first.stored(any_job.id)
    assert checkpoint["world_size"] == 1


def test_a_process_that_rank_0_starts_joins_and_a_second_experiment_is_another_one(job):
    first = job.make(2, REPLICATE_EXPERIMENT_ID=None)[0]
    child = "import replicate; print(replicate.init(quiet=True).id)"
    lines = first.run(
        "import subprocess, sys, replicate\n"
        "experiment = replicate.init(quiet=True)\nprint(experiment.id, flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
        "experiment.stop()\nprint(replicate.init(quiet=True).id)\n"
    ).split()
    assert lines[0] == lines[1] != lines[2]


def test_the_end_of_another_rank_is_not_that_of_the_experiment(job):
    first, second = job.make(2)
    first.start(
        "import sys, replicate\nexperiment = replicate.init(quiet=True)\nprint('up', flush=True)" + STEP
    )
    assert first.process.stdout.readline() == "up\n"
    second.run("import replicate\nexperiment = replicate.init(quiet=True)\nexperiment.stop()")
    second.start("import os, replicate\nreplicate.init(quiet=True)\nos._exit(3)")
    second.end()
    second.cli("flush")
    assert first.json("show", job.id)["status"] == "running"
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    first.cli("flush")
    assert second.json("show", job.id)["status"] == "killed"
