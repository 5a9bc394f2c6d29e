"""Every store that the contract is tested on."""

from pathlib import Path

import pytest

from replicated.store.base import Store
from replicated.store.limited import LimitedStore, UploadLimit
from replicated.store.local import LocalStore
from replicated.store.memory import MemoryStore


@pytest.fixture(params=["local", "memory", "limited"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "limited":
        return LimitedStore(MemoryStore(), UploadLimit(1 << 40))
    return LocalStore(tmp_path) if request.param == "local" else MemoryStore()
