"""Which process of a distributed job this is, and what the processes have to agree on without talking.

Recognises torch.distributed when it is initialised (nothing is imported for it), torchrun and others that
set RANK and WORLD_SIZE, Open MPI, MVAPICH, PMI and PMIx launchers, and Slurm. Ranks agree on the id of their
experiment and on those of the checkpoints that they add files to: from REPLICATE_EXPERIMENT_ID, from torch's
store, or by hashing what the launcher tells all of them alike. Invariant: no call here waits for another
rank, but for the value that rank 0 puts into torch's store, and for that only so long. See
docs/distributed.md.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePath
from typing import Any, Final

from replicate.ids import CheckpointId, ExperimentId, is_id

EXPERIMENT_VARIABLE: Final = "REPLICATE_EXPERIMENT_ID"
#: What tells one start of a job from the next where the launcher does not; the same word in all ranks.
ATTEMPT_VARIABLE: Final = "REPLICATE_ATTEMPT"
#: Seconds that the parts of a checkpoint wait for the others without news of them.
PATIENCE_VARIABLE: Final = "REPLICATE_RANK_TIMEOUT"

#: How long rank 0 may take to put into torch's store what others look for there.
STORE_PATIENCE_S: Final = 30.0

#: Variables with the rank and with the number of ranks, those that say it best first: what starts processes
#: within an allocation of Slurm leaves the variables of Slurm as they are.
_LAUNCHERS: Final = (
    ("RANK", ("WORLD_SIZE",)),
    ("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    ("PMI_RANK", ("PMI_SIZE",)),
    ("PMIX_RANK", ("PMIX_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
)
#: Variables whose values together are of one job only, each of them the same in all its ranks; the optional
#: ones last. `none` is torchrun's word for a job that has no name.
_IDENTITIES: Final = {
    "RANK": (("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"), ()),
    "OMPI_COMM_WORLD_RANK": (("PMIX_NAMESPACE",), ()),
    "PMIX_RANK": (("PMIX_NAMESPACE",), ()),
    "SLURM_PROCID": (("SLURM_JOB_ID", "SLURM_STEP_ID"), ("SLURM_CLUSTER_NAME",)),
}
_UNNAMED: Final = frozenset({"", "none"})
#: What tells one start of a job from the next, where it is known; the same in all ranks.
_ATTEMPTS: Final = (
    ATTEMPT_VARIABLE,
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "PMIX_NAMESPACE",
)


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of its job; there are at least two."""

    rank: int
    world_size: int
    #: What is of this job only, in all ranks alike; empty when the launcher tells nothing of the kind.
    launch: str = ""


def detect(environment: Mapping[str, str] | None = None) -> Place | None:
    """The place of this process; None for a process alone, and where nothing says that there are others."""
    variables = os.environ if environment is None else environment
    launcher, found = _read_launcher(variables)
    group = _torch_group()
    if group is not None:
        # What the processes themselves agreed on; it need not be what they were started as.
        found = group
    if found is None or found[1] < 2:
        return None
    return Place(*found, launch=_launch_identity(variables, launcher))


def attempt_of(environment: Mapping[str, str] | None = None) -> str:
    """What the launcher says that tells this start of the job from others; empty when that is nothing."""
    variables = os.environ if environment is None else environment
    told = [(name, variables.get(name, "").strip()) for name in _ATTEMPTS]
    return " ".join(f"{name}={value}" for name, value in told if value.lower() not in _UNNAMED)


def patience_s() -> float:
    """The seconds in REPLICATE_RANK_TIMEOUT; 0 when it is not set. Raises `ValueError`."""
    text = os.environ.get(PATIENCE_VARIABLE, "").strip()
    try:
        seconds = float(text or 0)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{PATIENCE_VARIABLE} must be a number of seconds, not {text!r}")
    return seconds


def given_experiment() -> str:
    """The reference in REPLICATE_EXPERIMENT_ID, but for what this very process has set there; else empty."""
    given = os.environ.get(EXPERIMENT_VARIABLE, "").strip()
    return "" if _told_children == (os.getpid(), given) else given


def tell_children(experiment_id: ExperimentId) -> None:
    """Let processes that this one starts from now on join the experiment."""
    global _told_children
    _told_children = (os.getpid(), experiment_id)
    os.environ[EXPERIMENT_VARIABLE] = experiment_id


def next_experiment() -> int:
    """Which experiment of this process is about to begin, from 0: the ranks begin them in the same order."""
    with _lock:
        number = _begun[os.getpid()]
        _begun[os.getpid()] += 1
        return number


def derived_experiment(place: Place, number: int) -> ExperimentId | None:
    """The id that every rank finds by itself; None when the launcher tells nothing of this job only."""
    if not place.launch:
        return None
    script = PurePath(sys.argv[0]).name if getattr(sys, "argv", None) else ""
    return ExperimentId(_hash("experiment", place.launch, script, str(place.world_size), str(number)))


def share_experiment(number: int, experiment_id: ExperimentId) -> None:
    """Put the id into torch's store, if there is one, for ranks that cannot find it by themselves."""
    store = _torch_store()
    if store is not None:
        _set(store, f"replicate/experiment/{number}", experiment_id)


def shared_experiment(number: int) -> ExperimentId | None:
    """The id that rank 0 has put into torch's store, or soon puts there; None without it."""
    store = _torch_store()
    found = None if store is None else _get(store, f"replicate/experiment/{number}")
    return ExperimentId(found) if found is not None and is_id(found) else None


def agree_on_attempt(place: Place, experiment_id: ExperimentId) -> str:
    """What tells this start of the job from others, in all ranks alike.

    In torch's store, because the launchers of several machines may count restarts differently.
    """
    told = attempt_of()
    store = _torch_store()
    if store is None:
        return told
    key = f"replicate/attempt/{experiment_id}"
    if place.rank:
        return _get(store, key) or told
    mine = os.urandom(16).hex()
    return mine if _set(store, key, mine) else told


def shared_checkpoint(
    experiment_id: ExperimentId, attempt: str, step: int | None, number: int
) -> CheckpointId:
    """The id of a checkpoint that every rank finds by itself.

    `step` is the one that was given; `number` counts, from 0, the checkpoints with files of this process that
    were given it.
    """
    which = "" if step is None else str(step)
    return CheckpointId(_hash("checkpoint", experiment_id, attempt, which, str(number)))


def is_start_unknown() -> bool:
    """Whether nothing tells this start of the job from others."""
    return not attempt_of() and _torch_store() is None


def check_place(rank: object, world_size: object) -> Place | None:
    """The place that was handed in, else the one that is detected; None for a process alone.

    Raises `TypeError` or `ValueError`. `world_size=1` says that the process is alone.
    """
    for value, name in ((rank, "rank"), (world_size, "world_size")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, not {value!r}")
    found = detect()
    size = world_size if isinstance(world_size, int) else found.world_size if found else None
    number = rank if isinstance(rank, int) else found.rank if found else None
    if rank is not None and size is None:
        raise ValueError("rank needs world_size: how many processes add to the checkpoint")
    if size is None:
        return None
    if not 1 <= size <= 1_000_000:
        raise ValueError(f"world_size must be between 1 and 1000000, not {size}")
    if size == 1 and rank is None:
        return None
    if number is None:
        raise ValueError("world_size needs rank: which of these processes this is, from 0")
    if not 0 <= number < size:
        raise ValueError(f"rank must be between 0 and {size - 1}, one less than world_size, not {number}")
    return Place(number, size, found.launch if found else "") if size > 1 else None


def _read_launcher(variables: Mapping[str, str]) -> tuple[str, tuple[int, int] | None]:
    """The variable with the rank, and rank and number of ranks, of the launcher that says it best."""
    for rank_name, size_names in _LAUNCHERS:
        rank = _read_number(variables, rank_name)
        size = next((n for name in size_names if (n := _read_number(variables, name)) is not None), None)
        if rank is not None and size is not None and rank < size:
            return rank_name, (rank, size)
    return "", None


def _read_number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _launch_identity(variables: Mapping[str, str], launcher: str) -> str:
    names, optional = _IDENTITIES.get(launcher, ((), ()))
    told = {name: variables.get(name, "").strip() for name in (*names, *optional)}
    if not names or any(told[name].lower() in _UNNAMED for name in names):
        return ""
    # Of every launcher that tells it: a job that is put back into the queue is another one.
    restarts = [variables.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return "\n".join([*(f"{name}={value}" for name, value in told.items()), *restarts])


def _hash(*words: str) -> str:
    told = b"".join(len(word.encode()).to_bytes(4, "big") + word.encode() for word in words)
    return hashlib.sha256(b"replicate ranks 1" + told).hexdigest()


def _torch_group() -> tuple[int, int] | None:
    """Rank and number of ranks of torch's default process group, if the script has initialised it."""
    distributed = _torch_distributed()
    try:
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return None
        rank, size = int(distributed.get_rank()), int(distributed.get_world_size())
    except Exception:  # of somebody else's library: what cannot be asked is not known
        return None
    return (rank, size) if 0 <= rank < size else None


def _torch_store() -> Any | None:
    """The store that the processes of torch's default group have in common."""
    if _torch_group() is None:
        return None
    try:
        store: Any = sys.modules["torch.distributed.distributed_c10d"]._get_default_store()
    except Exception:  # a version of torch that hides it
        return None
    return store


def _torch_distributed() -> Any | None:
    torch = sys.modules.get("torch")
    return sys.modules.get("torch.distributed") if torch is not None else None


def _set(store: Any, key: str, value: str) -> bool:
    try:
        store.set(key, value)
    except Exception:  # the process that holds it has ended
        return False
    return True


def _get(store: Any, key: str) -> str | None:
    """A value that another rank has set, or sets soon."""
    try:
        store.wait([key], timedelta(seconds=STORE_PATIENCE_S))
        found = store.get(key)
    except Exception:  # late, or the process that holds it has ended
        return None
    return found.decode(errors="replace") if isinstance(found, bytes) else str(found)


_lock = threading.Lock()
#: How many experiments a process has begun, by pid: a forked child counts anew.
_begun: Counter[int] = Counter()
#: The pid that has set REPLICATE_EXPERIMENT_ID, and to what.
_told_children: tuple[int, str] | None = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
