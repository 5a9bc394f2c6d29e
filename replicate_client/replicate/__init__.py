"""Version control for machine learning.

    import replicate

    experiment = replicate.init(path=".", params={"learning_rate": 0.01})
    for epoch in range(10):
        ...
        experiment.checkpoint(
            path="model.pt", metrics={"loss": loss}, primary_metric=("loss", "minimize")
        )

Names are loaded at their first use, so that importing this package costs nothing.
"""

from __future__ import annotations

# Not used here: a Python that ends tells this module, if it is there, before it calls what was registered
# with `atexit`; an experiment that begins there must know.
import threading as _threading  # noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replicate import errors as errors
    from replicate._version import __version__ as __version__
    from replicate.errors import ReplicateError as ReplicateError
    from replicate.experiment import Checkpoint as Checkpoint
    from replicate.experiment import CheckpointList as CheckpointList
    from replicate.experiment import Experiment as Experiment
    from replicate.experiment import ExperimentList as ExperimentList
    from replicate.project import ExperimentCollection as ExperimentCollection
    from replicate.project import Project as Project
    from replicate.project import experiments as experiments
    from replicate.project import flush as flush
    from replicate.project import init as init

#: Public name → the module that defines it.
_MODULES = {
    "Checkpoint": "experiment",
    "CheckpointList": "experiment",
    "Experiment": "experiment",
    "ExperimentCollection": "project",
    "ExperimentList": "experiment",
    "Project": "project",
    "ReplicateError": "errors",
    "__version__": "_version",
    "experiments": "project",
    "flush": "project",
    "init": "project",
}

__all__ = [*sorted(_MODULES), "errors"]


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("replicate.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"replicate.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
