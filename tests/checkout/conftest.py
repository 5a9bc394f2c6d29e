"""Planning and executing in one call."""

import os

import pytest

from replicated.checkout import execute, plan


def check_out(tree, output, *, path=b"", force=False, delete=False, on_progress=None):
    steps = plan(tree, os.fsencode(output), path=path, delete=delete)
    if not force:
        steps.refuse_conflicts()
    execute(steps, tree, on_progress)
    return [(action.verb, action.path) for action in steps.actions]


@pytest.fixture(scope="session")
def checkout():
    return check_out
