"""docs/python.md gives the signatures and attributes that the library has."""

import inspect
import re
from pathlib import Path

import pytest

import replicate

TEXT = (Path(__file__).parents[2] / "docs/python.md").read_text()
SIGNATURES = re.findall(r"^((?:replicate|[A-Z]\w+)(?:\.\w+)?)(\(.*\))$", TEXT, flags=re.MULTILINE)


def plain(function) -> str:
    """A signature without annotations and without self."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def find(name: str):
    found = replicate
    for part in name.split("."):
        found = found if part == "replicate" else getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "parameters"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_signatures_are_as_documented(name, parameters):
    assert plain(find(name)) == parameters


def test_there_are_signatures_to_compare():
    assert len(SIGNATURES) >= 25


@pytest.mark.parametrize("owner", ["Experiment", "Checkpoint"])
def test_attributes_are_as_documented(owner):
    sentence = re.search(rf"An? `{owner}` has (.*?)\.\s", TEXT, flags=re.DOTALL)
    documented = set(re.findall(r"`(\w+)`", sentence.group(1)))
    properties = {
        name
        for name, _ in inspect.getmembers(getattr(replicate, owner), lambda m: isinstance(m, property))
        if not name.startswith("_")
    }
    assert documented == properties
