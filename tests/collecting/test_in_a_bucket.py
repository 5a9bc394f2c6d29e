"""A collection in a bucket, with machines of their own that write and read meanwhile."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from collecting.conftest import remove
from repository.conftest import Load, Save
from servers import s3_servers

from replicate.ids import ExperimentId, new_id
from replicated.collecting import collect
from replicated.keys import PACK_PREFIX
from replicated.publishing import publish_experiment
from replicated.repository import Repository
from replicated.store import open_store

pytestmark = pytest.mark.timeout(300)

URL = "s3://collected/models"
BIG = random.Random(2).randbytes(400_000)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with s3_servers.moto() as server:
        yield {**s3_servers.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}


def open_machine(environment: dict[str, str], cache: Path) -> Repository:
    return Repository.open_on(open_store(URL, create=True, environment=environment), cache=cache, create=True)


def packs(repository: Repository) -> set[str]:
    return {info.key for info in repository.store.list(PACK_PREFIX)}


def test_collecting_while_another_machine_is_frozen_before_it_commits(
    environment: dict[str, str], tmp_path: Path, save: Save, load: Load
) -> None:
    writer, collector = (open_machine(environment, tmp_path / name) for name in ("writer", "collector"))
    kept = save(writer, {"a": BIG[:50_000], "same": b"same" * 1000})
    removed = save(writer, {"b": BIG, "same": b"same" * 1000})
    needed = packs(writer)
    # What it relies on is just what goes: it has looked it up, announces it, and is frozen.
    frozen = save(writer, {"c": BIG})
    record = replace(writer.load_experiment(frozen.id), id=ExperimentId(new_id()))
    generation = writer.index.generation
    remove(collector, frozen)
    remove(collector, removed)
    publication = publish_experiment(record, frozen.root)

    report = collect(collector)
    assert report.packs > 0
    assert len(packs(collector)) < len(needed)
    assert collect(collector).packs == 0
    assert load(collector, kept.id) == load(writer, kept.id)

    writer.publisher.announce(publication)
    assert not writer.publisher.settle(publication, generation)
    again = save(writer, {"c": BIG})
    assert again.root == frozen.root
    for reader in (writer, collector, open_machine(environment, tmp_path / "cold")):
        assert load(reader, again.id) == {"c": BIG}
        assert load(reader, kept.id) == {"a": BIG[:50_000], "same": b"same" * 1000}
    remove(writer, again)
    # What is announced keeps it.
    assert collect(collector).packs == 0


def test_the_program_that_the_daemon_starts_reaches_a_bucket(
    environment: dict[str, str], tmp_path: Path, save: Save
) -> None:
    writer = open_machine(environment, tmp_path / "writer")
    remove(writer, save(writer, {"only here": BIG[::-1]}))
    before = packs(writer)
    order = {
        "repository": URL,
        "cache": str(tmp_path / "gc"),
        "leased": [],
        "dry_run": False,
        "upload_age_s": 0.0,
    }
    result = subprocess.run(
        [sys.executable, "-m", "replicated", "gc-process"],
        input=json.dumps(order),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"report"' in result.stdout.splitlines()[-1]
    assert packs(writer) < before
