"""Which process of which job this is, by what launchers say."""

import os
import sys
import types

import pytest

from replicate import ranks
from replicate.ids import is_id
from replicate.ranks import Place

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run-7",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_RESTART_COUNT": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
}


@pytest.mark.parametrize(
    ("environment", "rank", "world_size", "is_named"),
    [
        (TORCHRUN, 1, 4, True),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}, 1, 4, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 0, 2, False),
        (SLURM, 3, 8, True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, 3, 4, True),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 1, 2, False),
        (OPEN_MPI, 2, 3, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 1, 2, False),
        ({"PMIX_RANK": "1", "SLURM_NTASKS": "2", "PMIX_NAMESPACE": "slurm.1.0"}, 1, 2, True),
        ({"MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "6"}, 5, 6, False),
        # What is started within an allocation of Slurm is not the task that its variables speak of.
        ({**SLURM, **OPEN_MPI}, 2, 3, True),
        ({**SLURM, **TORCHRUN}, 1, 4, True),
    ],
)
def test_launchers_are_recognised(environment, rank, world_size, is_named):
    place = ranks.detect(environment)
    assert (place.rank, place.world_size, bool(place.launch)) == (rank, world_size, is_named)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
    ],
)
def test_a_process_alone_is_no_rank(environment):
    assert ranks.detect(environment) is None


def test_the_ranks_of_a_job_derive_the_same_experiment_and_others_do_not():
    def derive(number=0, **changes):
        return ranks.derived_experiment(ranks.detect({**TORCHRUN, **changes}), number)

    first = derive()
    assert is_id(first)
    assert derive(RANK="0") == derive(RANK="3", LOCAL_RANK="0") == first
    others = {
        derive(TORCHELASTIC_RUN_ID="run-8"),
        derive(TORCHELASTIC_RESTART_COUNT="1"),
        derive(MASTER_PORT="29501"),
        derive(WORLD_SIZE="5"),
        derive(number=1),
        derive(**SLURM),
        first,
    }
    assert len(others) == 7
    assert ranks.derived_experiment(ranks.detect({"RANK": "0", "WORLD_SIZE": "2"}), 0) is None


def test_a_requeued_job_of_slurm_is_another_one():
    derived = [
        ranks.derived_experiment(ranks.detect({**SLURM, "SLURM_RESTART_COUNT": count}), 0)
        for count in ("0", "1")
    ]
    assert derived[0] != derived[1]


def test_starts_of_a_job_are_told_apart_where_the_launcher_does():
    assert ranks.attempt_of({"RANK": "0", "WORLD_SIZE": "2"}) == ""
    told = {
        ranks.attempt_of(variables)
        for variables in (
            TORCHRUN,
            {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"},
            SLURM,
            {"REPLICATE_ATTEMPT": "second"},
        )
    }
    assert len(told) == 4 and "" not in told
    assert ranks.attempt_of(TORCHRUN) == ranks.attempt_of({**TORCHRUN, "RANK": "3"})


def test_checkpoints_have_ids_by_step_and_number():
    experiment = "e" * 64
    found = {
        ranks.shared_checkpoint(experiment, attempt, step, number)
        for attempt in ("", "2")
        for step in (None, 0, 1)
        for number in (0, 1)
    }
    assert len(found) == 12 and all(map(is_id, found))


def test_what_is_handed_in_counts_more_than_what_is_found(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert ranks.check_place(None, None).rank == 1
    assert ranks.check_place(0, None) == Place(0, 4, ranks.detect().launch)
    assert ranks.check_place(2, 3).world_size == 3
    assert ranks.check_place(None, 1) is None
    assert ranks.check_place(0, 1) is None


@pytest.mark.parametrize(
    ("rank", "world_size", "error", "message"),
    [
        ("0", 2, TypeError, "rank must be an int"),
        (True, 2, TypeError, "rank must be an int"),
        (0, 2.0, TypeError, "world_size must be an int"),
        (0, None, ValueError, "rank needs world_size"),
        (None, 2, ValueError, "world_size needs rank"),
        (2, 2, ValueError, "between 0 and 1"),
        (-1, 2, ValueError, "between 0 and 1"),
        (0, 0, ValueError, "world_size must be between"),
    ],
)
def test_impossible_places_are_refused(monkeypatch, rank, world_size, error, message):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(error, match=message):
        ranks.check_place(rank, world_size)


def test_what_rank_0_tells_its_children_is_not_told_to_itself(monkeypatch):
    monkeypatch.setenv("REPLICATE_EXPERIMENT_ID", "")
    ranks.tell_children("a" * 64)
    assert os.environ["REPLICATE_EXPERIMENT_ID"] == "a" * 64
    assert ranks.given_experiment() == ""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert ranks.given_experiment() == "a" * 64
    monkeypatch.undo()
    assert ranks.given_experiment() == ""


class Store:
    """What torch's stores do, as far as ranks use it: `wait` fails for what nobody sets."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def wait(self, keys, timeout):
        if not all(key in self.values for key in keys):
            raise RuntimeError("wait timeout")

    def get(self, key):
        return self.values[key]


def pretend_torch(monkeypatch, rank, world_size, store):
    """An initialised torch.distributed as its modules show it; `.ci/distributed` runs the real one."""
    distributed = types.ModuleType("torch.distributed")
    distributed.is_available = distributed.is_initialized = lambda: True
    distributed.get_rank, distributed.get_world_size = lambda: rank, lambda: world_size
    c10d = types.ModuleType("torch.distributed.distributed_c10d")
    c10d._get_default_store = lambda: store
    for name, module in (
        ("torch", types.ModuleType("torch")),
        ("torch.distributed", distributed),
        ("torch.distributed.distributed_c10d", c10d),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def test_ranks_agree_through_the_store_of_torch(monkeypatch):
    store, experiment = Store(), "c" * 64
    pretend_torch(monkeypatch, 0, 2, store)
    first = ranks.detect({**TORCHRUN})
    assert (first.rank, first.world_size) == (0, 2)
    ranks.share_experiment(0, experiment)
    attempt = ranks.agree_on_attempt(first, experiment)
    pretend_torch(monkeypatch, 1, 2, store)
    second = ranks.detect({})
    assert second == Place(1, 2)
    assert ranks.shared_experiment(0) == experiment
    assert ranks.shared_experiment(1) is None
    assert ranks.agree_on_attempt(second, experiment) == attempt != ""
