"""Every store that the contract is tested on."""

from pathlib import Path

import pytest

from replicated.store.base import Store
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path) if request.param == "local" else MemoryStore()
