"""An upload that is interrupted goes on where it was: what is listed in an index object is not sent again."""

import threading
import time

import pytest
from object_storage.machines import model, wait_until
from servers import faults

from replicated.packer import INDEX_AFTER_S

#: Several packs.
SIZE = 120 << 20


def packs_sent(counted):
    return sum(one.bytes_up for one in counted.of("PUT", "packs"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["serve", "store-process"])
def test_what_was_uploaded_and_listed_is_not_sent_again(machine, proxy, killed):
    """kill -9 in the middle of one file; the bytes of packs are counted."""
    with (machine.directory / "replicate.yaml").open("a") as settings:
        # What is held by leases would go with the daemon.
        settings.write("capture: copy\n")
    experiment, *_ = machine.train()
    machine.flush()
    # One pack takes so long that it is listed as soon as it is there; the others never arrive.
    moment = threading.Event()
    with proxy.counting() as before:
        slow = proxy.add(faults.hold(moment), "PUT", "/packs/", times=1)
        proxy.add(faults.hang, "PUT", "/packs/")
        _, checkpoint = train_on(machine, experiment)
        wait_until(lambda: slow.hits, "the first pack is sent")
        time.sleep(INDEX_AFTER_S + 1)
        moment.set()
        (index,) = wait_until(lambda: before.of("PUT", "log/index"), "the pack is listed")
        wait_until(lambda: index.status == 200, "the index object is stored")
        if killed == "serve":
            machine.kill_daemon()
        else:
            machine.kill(b"store-process")
    (arrived,) = (one for one in before.of("PUT", "packs") if one.status == 200)
    with proxy.counting() as after:
        proxy.clear()
        machine.flush()
    print(f"{arrived.bytes_up >> 20} MiB had arrived, {packs_sent(after) >> 20} MiB were sent afterwards")
    assert arrived.bytes_up > 1 << 20
    assert packs_sent(after) <= SIZE - arrived.bytes_up + (1 << 20)
    assert machine.run("cat", checkpoint, "model.pt", text=False).stdout == model(1, 0, SIZE)


def train_on(machine, experiment):
    """One checkpoint more of an experiment, so that nothing else is stored."""
    machine.access["REPLICATE_EXPERIMENT_ID"] = experiment
    try:
        return machine.train(1, SIZE)
    finally:
        del machine.access["REPLICATE_EXPERIMENT_ID"]
