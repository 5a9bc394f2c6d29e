"""Opening repositories that are slow, away or reached in another way, and what is remembered of them."""

import threading
import time
from datetime import timedelta

import pytest

from replicate.errors import RepositoryUnreachable
from replicate.ids import ExperimentId, new_id
from replicate.records import utc_now
from replicated import repositories as opening
from replicated.format.metadata import Heartbeat, LiveRun
from replicated.live_runs import find_live
from replicated.patience import Patience
from replicated.reaching import Access, process_environment
from replicated.repositories import OpenRepositories
from replicated.repository import Repository
from replicated.standings import Standings
from replicated.store.base import Capabilities, ObjectInfo
from replicated.store.memory import MemoryStore

URL = "s3://lab/models"


class Bucket(MemoryStore):
    """A store in memory that says that its requests are costly, counts them, and can be away or hang."""

    def __init__(self):
        super().__init__()
        self.requests = 0
        self.is_away = False
        self.lets_go = threading.Event()
        self.lets_go.set()

    @property
    def capabilities(self):
        return Capabilities(has_costly_requests=True)

    def get(self, key, offset=0, length=None):
        self._ask()
        return super().get(key, offset, length)

    def exists(self, key):
        self._ask()
        return super().exists(key)

    def _ask(self):
        self.requests += 1
        assert self.lets_go.wait(60)
        if self.is_away:
            raise RepositoryUnreachable("the network is down", hint="plug it in")


@pytest.fixture
def bucket(monkeypatch):
    """What any URL of a bucket opens; it keeps the environment that it was opened with last."""
    made = Bucket()
    made.environment = "never opened"

    open_other = opening.open_store

    def open_store(url, *, create, environment=None, patience_s=0.0):
        if url != URL:
            return open_other(url, create=create)
        made.environment = environment
        return made

    monkeypatch.setattr(opening, "open_store", open_store)
    yield made
    made.lets_go.set()


@pytest.fixture
def standings(tmp_path):
    made = Standings(tmp_path / "repositories.db", time.time_ns)
    yield made
    made.close()


@pytest.fixture
def access():
    return Access()


@pytest.fixture
def make(tmp_path, access, standings):
    made = []

    def make(patience_s=60.0):
        made.append(
            OpenRepositories(
                tmp_path / "cache", access=access, standings=standings, patience=Patience(patience_s)
            )
        )
        return made[-1]

    yield make
    for repositories in made:
        repositories.close()


def test_an_open_bucket_is_not_asked_again_at_once(make, bucket):
    repositories = make()
    repository = repositories.get(URL, create=True)
    before = bucket.requests
    assert all(repositories.get(URL) is repository for _ in range(10))
    assert bucket.requests == before


def test_a_bucket_is_reached_with_what_was_brought_last(make, bucket, access):
    repositories = make()
    repository = repositories.get(URL, create=True)
    assert bucket.environment is None
    assert access.note(URL, {"AWS_PROFILE": "one"})
    assert not access.note(URL, {"AWS_PROFILE": "one"})
    # The same object: who uses it meanwhile is not disturbed.
    assert repositories.get(URL) is repository
    assert bucket.environment == {"AWS_PROFILE": "one"}
    assert not access.note("file:///somewhere", {"AWS_PROFILE": "one"})
    assert "one" not in repr(access)


def test_one_that_hangs_is_given_up_soon_and_holds_up_no_other(make, bucket, tmp_path):
    repositories = make(patience_s=0.3)
    bucket.lets_go.clear()
    with pytest.raises(RepositoryUnreachable, match="does not answer"):
        repositories.get(URL, create=True)
    before = bucket.requests
    with pytest.raises(RepositoryUnreachable, match="does not answer"):
        repositories.get(URL, create=True)  # told of the opening that still hangs
    assert bucket.requests == before
    assert repositories.get(f"file://{tmp_path}/local", create=True).id
    bucket.lets_go.set()
    assert make().get(URL, create=True).id


def test_what_was_opened_once_is_remembered_by_the_next_process(make, bucket):
    assert not make().has_used(URL)
    identifier = make().get(URL, create=True).id
    bucket.is_away = True
    later = make()
    assert later.has_used(URL)
    with pytest.raises(RepositoryUnreachable, match="the network is down") as caught:
        later.get(URL)
    remembered = later.remembered(URL, caught.value)
    assert remembered.id == identifier
    with pytest.raises(RepositoryUnreachable, match="the network is down"):
        remembered.list_experiment_ids()
    assert later.remembered("s3://lab/other", caught.value) is None


def test_trouble_is_remembered_since_it_began(tmp_path):
    times = iter(range(10**9, 10**12, 10**9))
    file = tmp_path / "repositories.db"
    first = Standings(file, lambda: next(times))
    first.note_trouble(URL, "the network is down", retry_in_s=2)
    begun = first.trouble(URL)
    assert begun.retry_at_ns - begun.since_ns == 2 * 10**9
    first.note_trouble(URL, "access denied", retry_in_s=4)
    daemon_id = first.daemon_id()
    first.close()
    second = Standings(file, lambda: next(times))
    again = second.trouble(URL)
    assert (again.since_ns, again.reason, again.retry_at_ns) == (begun.since_ns, "access denied", 0)
    assert second.daemon_id() == daemon_id
    second.note_well(URL)
    assert second.trouble(URL) is None
    assert second.troubles() == {}
    second.close()


def test_a_file_of_standings_that_is_damaged_is_made_anew(tmp_path, caplog):
    file = tmp_path / "repositories.db"
    file.write_bytes(b"\x00\xff" * 5000)
    made = Standings(file, time.time_ns)
    assert made.troubles() == {}
    made.remember(URL, b"settings")
    assert made.settings(URL) == b"settings"
    made.close()
    assert "is lost" in caplog.text


def test_no_variable_of_this_process_is_mixed_with_those_of_a_user(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "daemon")
    monkeypatch.setenv("PATH", "/bin")
    environment = process_environment({"AWS_ACCESS_KEY_ID": "user"})
    assert "AWS_PROFILE" not in environment
    assert (environment["AWS_ACCESS_KEY_ID"], environment["PATH"]) == ("user", "/bin")
    assert process_environment(None) is None


class Aged(Bucket):
    """Tells of each object how old it is."""

    def __init__(self, ages):
        super().__init__()
        self.ages = ages

    def list(self, prefix):
        for info in super().list(prefix):
            yield ObjectInfo(info.key, info.size, self.ages.get(info.key))


@pytest.mark.parametrize(("age_s", "is_live"), [(0, True), (194, True), (196, False), (3600, False)])
def test_a_sign_of_life_counts_by_the_clock_of_the_store(tmp_path, age_s, is_live):
    daemon, experiment = new_id(), ExperimentId(new_id())
    store = Aged({f"heartbeats/{daemon}.json": float(age_s)})
    repository = Repository.open_on(store, cache=tmp_path, create=True)
    # The clock of that machine is two days fast, which does not matter.
    told = Heartbeat(daemon, utc_now() + timedelta(days=2), "there", 60, (LiveRun(experiment),))
    repository.put_heartbeat(told)
    assert find_live(repository) == ({experiment} if is_live else set())
    repository.close()


def test_where_the_store_does_not_tell_its_own_time_counts(tmp_path):
    experiments = [ExperimentId(new_id()) for _ in range(2)]
    repository = Repository.open_on(Aged({}), cache=tmp_path, create=True)
    for experiment, age_s in zip(experiments, (44, 46), strict=True):
        time_of = utc_now() - timedelta(seconds=age_s)
        repository.put_heartbeat(Heartbeat(new_id(), time_of, "there", 10, (LiveRun(experiment),)))
    assert find_live(repository) == {experiments[0]}
    repository.close()
