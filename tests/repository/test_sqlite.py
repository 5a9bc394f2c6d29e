"""Opening databases: made when new, checked when not, never changed when they are something else."""

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from replicated.sqlite import DatabaseUnusable, open_database

SCHEMA = """
-- A comment; with a semicolon.
CREATE TABLE numbers (
    value INTEGER NOT NULL, -- another; one
    name TEXT DEFAULT 'a;b'
);
CREATE INDEX by_value ON numbers (value);
"""


def open_test(path: Path, *, version: int = 1, durable: bool = True) -> sqlite3.Connection:
    return open_database(path, application_id=0x1234, user_version=version, schema=SCHEMA, durable=durable)


@pytest.mark.parametrize(("durable", "synchronous"), [(True, 2), (False, 1)])
def test_new_database_has_schema_and_identity(tmp_path: Path, durable: bool, synchronous: int) -> None:
    for _ in range(2):
        with closing(open_test(tmp_path / "db", durable=durable)) as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA application_id").fetchone() == (0x1234,)
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            assert names == {"numbers", "by_value"}


def test_with_commits_or_rolls_back(tmp_path: Path) -> None:
    with closing(open_test(tmp_path / "db")) as connection:
        with connection:
            connection.execute("INSERT INTO numbers (value) VALUES (1)")
            connection.execute("INSERT INTO numbers (value) VALUES (2)")
        with pytest.raises(KeyError), connection:
            connection.execute("INSERT INTO numbers (value) VALUES (3)")
            raise KeyError
    with closing(open_test(tmp_path / "db")) as connection:
        assert connection.execute("SELECT sum(value) FROM numbers").fetchone() == (3,)


def test_another_application_or_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    open_test(path, version=2).close()
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match="newer version: 2"):
        open_test(path, version=1)
    with pytest.raises(DatabaseUnusable, match="older version: 2"):
        open_test(path, version=3)
    with pytest.raises(DatabaseUnusable, match="another application: 0x00001234"):
        open_database(path, application_id=1, user_version=2, schema=SCHEMA, durable=True)
    assert path.read_bytes() == before


def test_database_of_somebody_who_sets_no_identity_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(DatabaseUnusable, match="another application"):
        open_test(tmp_path / "db")


@pytest.mark.parametrize("content", [b"garbage" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_garbage_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "db"
    path.write_bytes(content)
    with pytest.raises(DatabaseUnusable):
        open_test(path)
    assert path.read_bytes() == content


def test_damaged_pages_are_noticed_when_opening_what_must_be_durable(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with closing(open_test(path)) as connection, connection:
        connection.executemany("INSERT INTO numbers (value) VALUES (?)", ((n,) for n in range(20_000)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(DatabaseUnusable):
        open_test(path)


def test_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnusable) as caught:
        open_test(tmp_path / "no" / "db")
    assert caught.value.path == tmp_path / "no" / "db"
    assert "unable to open" in caught.value.reason


def test_many_openers_of_a_new_database_all_succeed(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        try:
            with closing(open_test(tmp_path / "db")) as connection, connection:
                connection.execute("INSERT INTO numbers (value) VALUES (1)")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with closing(open_test(tmp_path / "db")) as connection:
        assert connection.execute("SELECT count(*) FROM numbers").fetchone() == (8,)


def test_what_was_committed_survives_the_death_of_the_process(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from replicated.sqlite import open_database\n"
        "c = open_database(Path(sys.argv[1]), application_id=0x1234, user_version=1,"
        " schema='CREATE TABLE numbers (value);', durable=True)\n"
        "with c: c.execute('INSERT INTO numbers VALUES (7)')\n"
        "c.execute('INSERT INTO numbers VALUES (8)')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "db")], check=False)
    assert done.returncode == -9
    with closing(open_test(tmp_path / "db")) as connection:
        assert connection.execute("SELECT value FROM numbers").fetchall() == [(7,)]


UPGRADES = {
    1: "ALTER TABLE numbers ADD COLUMN sign TEXT DEFAULT '+';\nCREATE TABLE more (x INTEGER);",
    2: "INSERT INTO more VALUES (42);",
}


def open_upgrading(path: Path, version: int, upgrades: dict[int, str]) -> sqlite3.Connection:
    return open_database(
        path, application_id=0x1234, user_version=version, schema=SCHEMA, durable=True, upgrades=upgrades
    )


def test_older_database_is_brought_up_to_date_step_by_step(tmp_path: Path) -> None:
    with closing(open_test(tmp_path / "db", version=1)) as connection, connection:
        connection.execute("INSERT INTO numbers (value) VALUES (7)")
    for _ in range(2):
        with closing(open_upgrading(tmp_path / "db", 3, UPGRADES)) as connection:
            assert connection.execute("SELECT value, sign FROM numbers").fetchall() == [(7, "+")]
            assert connection.execute("SELECT x FROM more").fetchall() == [(42,)]
            assert connection.execute("PRAGMA user_version").fetchone() == (3,)


def test_upgrade_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    open_test(tmp_path / "db", version=1).close()
    with pytest.raises(DatabaseUnusable, match="no such table"):
        open_upgrading(tmp_path / "db", 3, {**UPGRADES, 2: "INSERT INTO nowhere VALUES (1);"})
    with closing(open_test(tmp_path / "db", version=1)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert names == {"numbers", "by_value"}


def test_older_database_without_all_upgrades_is_refused(tmp_path: Path) -> None:
    open_test(tmp_path / "db", version=1).close()
    with pytest.raises(DatabaseUnusable, match="older version: 1"):
        open_upgrading(tmp_path / "db", 3, {2: UPGRADES[2]})


def test_a_damaged_schema_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    open_test(path).close()
    sound = path.read_bytes()
    # What the library says of it quotes it.
    damaged = sound.replace(b"CREATE INDEX by_value ON numbers", b"CREATE INDEX by_value ON n\xccmbers")
    assert damaged != sound
    path.write_bytes(damaged)
    with pytest.raises(DatabaseUnusable, match="it is damaged") as raised:
        open_test(path)
    assert type(raised.value.__cause__) is sqlite3.DatabaseError
