"""Credentials that expire: the queue waits, says so, and goes on when there are new ones in the file."""

from object_storage.machines import model, wait_until
from servers import faults

SIZE = 50_000


def expired(exchange):
    """The old key is refused."""
    if any("AKIAOLD" in value for name, value in exchange.headers if name.lower() == "authorization"):
        faults.expired_token(exchange)
    else:
        faults.passing(exchange)


def write_credentials(file, key):
    file.write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\naws_session_token = token\n"
    )


def test_the_queue_waits_for_new_credentials_and_goes_on_by_itself(make_machine, proxy, tmp_path):
    file = tmp_path / "credentials"
    write_credentials(file, "AKIAOLD0000000000000")
    machine = make_machine(AWS_SHARED_CREDENTIALS_FILE=str(file))
    del machine.access["AWS_ACCESS_KEY_ID"], machine.access["AWS_SECRET_ACCESS_KEY"]
    go_on = machine.directory / "go-on"
    pause = f"while step == 0 and not pathlib.Path({str(go_on)!r}).exists(): pass"

    def is_stored():
        return machine.run("ls").stdout and machine.json("ls")[0]["num_checkpoints"]

    with machine.begin(3, SIZE, 2, pause) as run:
        wait_until(is_stored, "one is stored")
        rule = proxy.add(expired)
        go_on.touch()
        output, errors = run.communicate(timeout=100)
    assert run.returncode == 0, errors
    ids = output.split()
    standing = wait_until(
        lambda: next((one for one in machine.status()["repositories"] if one["waiting_because"]), None),
        "status says that a repository waits",
    )
    assert "expired" in standing["waiting_because"].lower()
    assert rule.hits
    assert machine.run("ls").returncode in (0, 3)
    write_credentials(file, "AKIANEW0000000000000")
    machine.flush()
    for step, checkpoint in enumerate(ids[1:]):
        assert machine.run("cat", checkpoint, "model.pt", text=False).stdout == model(2, step, SIZE)
    assert "secret" not in (machine.home / "logs" / "replicated.log").read_text()
