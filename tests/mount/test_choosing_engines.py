import importlib.metadata

import pytest

from replicate.errors import MountFailed
from replicated.mount.engine import choosing
from replicated.mount.engine.choosing import EngineState, choose, describe
from replicated.mount.engine.libfuse import Finding
from replicated.mount.options import ENGINES, MountOptions


@pytest.fixture
def usable(monkeypatch):
    """Say which engines can be used."""

    def say(*names):
        checks = {
            name: lambda name=name: EngineState(name, name in names, f"why {name}", f"mend {name}")
            for name in ENGINES
        }
        monkeypatch.setattr(choosing, "_CHECKS", checks)

    return say


def test_every_engine_is_described_in_the_order_in_which_they_are_tried():
    assert [state.name for state in describe()] == list(ENGINES)


def test_the_first_that_can_be_used_is_chosen(usable):
    usable("mfusepy", "fusepy")
    assert choose(MountOptions()).__name__ == "replicated.mount.engine.mfusepy_engine"


def test_an_engine_that_was_asked_for_is_chosen_before_better_ones(usable):
    usable("native", "mfusepy")
    assert choose(MountOptions(engine="mfusepy")).__name__ == "replicated.mount.engine.mfusepy_engine"


def test_an_engine_that_was_asked_for_is_not_replaced_by_another(usable):
    usable("native", "mfusepy")
    with pytest.raises(MountFailed, match="fusepy: why fusepy") as raised:
        choose(MountOptions(engine="fusepy"))
    assert raised.value.hint == "mend fusepy"


def test_without_any_engine_every_reason_is_told(usable):
    usable()
    with pytest.raises(MountFailed) as raised:
        choose(MountOptions())
    assert all(f"{name}: why {name}" in raised.value.message for name in ENGINES)
    assert raised.value.hint == "mend native"


def test_only_the_native_engine_is_tried_when_files_must_be_passed_through(usable):
    usable("mfusepy", "fusepy")
    with pytest.raises(MountFailed, match="native: why native; mfusepy: it cannot pass files through"):
        choose(MountOptions(passthrough="on"))


@pytest.mark.parametrize("name", ["mfusepy", "fusepy"])
def test_a_library_that_is_missing_is_named_with_its_package(name, monkeypatch):
    monkeypatch.setattr(choosing, "find_library", lambda: None)
    monkeypatch.setattr(choosing, "find_old_library", lambda: None)
    state = {state.name: state for state in describe()}[name]
    assert not state.is_usable
    assert {"mfusepy": "apt install fuse3", "fusepy": "apt install libfuse2"}[name] in state.hint


@pytest.mark.parametrize("name", ["mfusepy", "fusepy"])
def test_a_binding_that_is_missing_is_named(name, monkeypatch):
    def version(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    state = {state.name: state for state in describe()}[name]
    assert (state.is_usable, state.hint) == (False, f"install it (pip install {name})")


@pytest.mark.parametrize("name", ["mfusepy", "fusepy"])
def test_without_a_device_no_binding_can_be_used(name, monkeypatch):
    monkeypatch.setattr(choosing, "check_device", lambda: Finding(False, "none", "make one"))
    state = {state.name: state for state in describe()}[name]
    assert (state.is_usable, state.detail, state.hint) == (False, "none", "make one")


def test_every_engine_that_cannot_be_used_says_what_to_do(monkeypatch):
    monkeypatch.setattr("replicated.mount.engine.libfuse.DEVICE", "/dev/no-such-device")
    assert all("replicate checkout" in state.hint and not state.is_usable for state in describe())


@pytest.mark.parametrize("name", ["mfusepy", "fusepy"])
def test_a_program_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    state = {state.name: state for state in describe()}[name]
    assert not state.is_usable
    assert state.detail == {"mfusepy": "fusermount3", "fusepy": "fusermount"}[name] + " is not in the PATH"
    assert "apt install fuse3" in state.hint
